"""Compile the C of this folder for the processor at hand, once, with whatever C compiler there is.

A compiler is part of most machines that are used for computing; ``pip install 'swarm[compiler]'`` brings one (Zig's,
which is Clang). Without any, everything works as well, only slower.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from swarm.cache_directory import alone_in, cache_directory, write_atomically

logger = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
_SOURCES = ("linear.c", "attention.c", "blocks.c")
_HEADERS = ("native.h", "rows.h", "vectors.h")
# Nothing here that would let sums be made in another order.
_FLAGS = ("-O3", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-shared", "-fPIC")
_WAYS = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",), ())
"""Not every compiler knows each; the first that works is taken."""
_TIMEOUT_S = 120
_DIGEST_BYTES = hashlib.sha256().digest_size
"""Written after the end of a library, which does not mind."""


def compiled_library() -> Path | None:
    """The shared library for this machine: from the cache, else compiled now (some 5 s). None: there is no compiler.

    ``SWARM_NATIVE=0`` in the environment does without it.
    """
    if os.environ.get("SWARM_NATIVE") == "0":
        return None
    directory = cache_directory("native")
    target = directory / f"{_fingerprint()}.so"
    if not _is_whole(target):
        with alone_in(directory):
            if not _is_whole(target):
                _compile(target)
    return target if _is_whole(target) else None


def _is_whole(target: Path) -> bool:
    """Whether it is there as it was written: a damaged library would take the process down with it."""
    try:
        content = target.read_bytes()
    except OSError:
        return False
    return content[-_DIGEST_BYTES:] == hashlib.sha256(content[:-_DIGEST_BYTES]).digest()


def _compile(target: Path) -> None:
    """Leave the library at `target`, if any compiler makes one."""
    logger.info("compiling for this processor, once")
    said = ""
    with contextlib.ExitStack() as stack:
        try:  # not in /tmp, from which nothing may be loaded on some machines
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix=".", dir=target.parent))
        except OSError as error:
            logger.warning("%s cannot be written to, so this machine computes more slowly: %s", target.parent, error)
            return
        made = Path(directory) / "native.so"
        for compiler in _compilers():
            for way in _WAYS:
                command = [
                    *compiler,
                    *_FLAGS,
                    *way,
                    *(str(_FOLDER / name) for name in _SOURCES),
                    "-lm",
                    "-o",
                    str(made),
                ]
                try:
                    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
                except (OSError, subprocess.TimeoutExpired) as error:
                    said = str(error)
                    break
                if done.returncode == 0 and _can_be_loaded(made):
                    content = made.read_bytes()
                    write_atomically(target, content + hashlib.sha256(content).digest())
                    return
                said = done.stderr.strip() or said
    if said:
        logger.warning("no C compiler could compile what makes this machine faster; the last said: %s", said[-500:])
    else:
        logger.info("there is no C compiler here")


def _can_be_loaded(library: Path) -> bool:
    """Clang makes use of OpenMP's library even where there is none."""
    try:
        return bool(ctypes.CDLL(str(library)).swarm_blocks)
    except (OSError, AttributeError):
        return False


def _compilers() -> Iterator[Sequence[str]]:
    """Commands to try, in this order."""
    if named := os.environ.get("CC"):
        yield shlex.split(named)
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            yield [found]
    if importlib.util.find_spec("ziglang") is not None:
        yield [sys.executable, "-m", "ziglang", "cc"]


def _fingerprint() -> str:
    """Of all that the library depends on: what is compiled, how, and for which processor."""
    parts = [
        *((_FOLDER / name).read_text() for name in (*_HEADERS, *_SOURCES)),
        repr((_FLAGS, _WAYS)),
        platform.machine(),
    ]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    parts += [
        next((line for line in lines if line.startswith(name)), "") for name in ("model name", "flags", "Features")
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
