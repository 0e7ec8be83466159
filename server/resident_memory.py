"""Keep a server small: what it needed to start, or to load, goes back to the system."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import linecache
import mmap
import re
from collections.abc import Iterator
from pathlib import Path

import torch

_AREA = re.compile(
    r"(?P<begin>[0-9a-f]+)-(?P<end>[0-9a-f]+) (?P<permissions>\S{4}) \S+ \S+ \S+ *(?P<name>.*)", re.ASCII
)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_SMALL_BYTES = 128 * 1024
_LARGE_BYTES = 32 * 1024**2


def share_one_heap() -> None:
    """Keep threads that start after this from having heaps of their own, with free room in each (mallopt(3))."""
    with contextlib.suppress(AttributeError):  # only glibc has it
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


@contextlib.contextmanager
def memory_given_back() -> Iterator[None]:
    """Return to the system, at the end, what the block needed for a moment (180 MB for half of SmolLM2, measured).

    On glibc, meanwhile, every large tensor has a mapping of its own, which leaves no holes among small
    objects; later, large ones are reused (mallopt(3)).
    """
    libc = ctypes.CDLL(None)
    with contextlib.suppress(AttributeError):  # only glibc has it
        libc.mallopt(_M_MMAP_THRESHOLD, _SMALL_BYTES)
    try:
        yield
    finally:
        with contextlib.suppress(AttributeError):
            libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
            libc.mallopt(_M_TRIM_THRESHOLD, 2 * _LARGE_BYTES)
        give_memory_back()


def free_memory() -> None:
    """Let go of modules to which nothing refers any more. Nothing may be computed meanwhile."""
    gc.unfreeze()  # they refer to one another in circles
    give_memory_back()


def give_memory_back() -> None:
    """Return to the system what is not needed now. Nothing may be computed meanwhile."""
    linecache.clearcache()  # transformers reads its own source
    gc.collect()
    gc.freeze()  # what is here now is here to stay; the collector need not look at it again
    with contextlib.suppress(OSError, AttributeError):  # torch's BLAS keeps buffers if it is MKL
        ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).mkl_serv_free_buffers()
    with contextlib.suppress(AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
    _let_go_of_code()


def _let_go_of_code() -> None:
    """Take the pages of programs and libraries out of this process: most were needed to start, and never again.

    Those that are needed come back by themselves, from the system's cache. Where anything was written (relocations),
    nothing is touched. Only on Linux (madvise(2)).
    """
    try:
        areas = list(_read_only_file_areas(Path("/proc/self/smaps").read_text()))
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return
    for begin, end in areas:
        madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), ctypes.c_int(mmap.MADV_DONTNEED))


def _read_only_file_areas(smaps: str) -> Iterator[tuple[int, int]]:
    """The areas (first address, address after the last) that are just what is in a file, as proc(5) tells them."""
    area: tuple[int, int] | None = None
    for line in smaps.splitlines():
        if header := _AREA.match(line):
            is_file = "w" not in header["permissions"] and header["name"].startswith("/")
            area = (int(header["begin"], 16), int(header["end"], 16)) if is_file else None
        elif area is not None and line.startswith("Anonymous:"):
            if int(line.split()[1]) == 0:
                yield area
            area = None
