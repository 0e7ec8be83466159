"""What this machine has: a device to compute on, and memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator

import psutil
import torch

SHARE_OF_FREE = 0.8
"""By default a server takes this share of the memory that is free; the rest is its owner's."""


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_SMALL_BYTES = 128 * 1024
_LARGE_BYTES = 32 * 1024**2


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
        gc.collect()
        gc.freeze()  # what is here now is here to stay; the collector need not look at it again
        with contextlib.suppress(AttributeError):
            libc.malloc_trim(0)
            libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
            libc.mallopt(_M_TRIM_THRESHOLD, 2 * _LARGE_BYTES)


def choose_device(wanted: str) -> torch.device:
    """``auto`` is the first CUDA device, or else the CPU.

    Raises:
        ValueError: there is no such device.
    """
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"There is no device {wanted!r} on this machine: {str(error).splitlines()[0]}") from None
    return device


def allowed_memory(device: torch.device, wanted_bytes: int | None) -> tuple[int, str]:
    """(bytes that the server may use on `device`, how that came about)."""
    if wanted_bytes is not None:
        return wanted_bytes, "--memory"
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return int(free * SHARE_OF_FREE), f"{SHARE_OF_FREE:.0%} of the {free / 1024**3:.1f} GiB that are free"
