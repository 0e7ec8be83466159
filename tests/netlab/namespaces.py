"""Network namespaces: make them, enter them, and leave nothing of them behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import psutil

_DIRECTORY = Path("/run/netns")  # of iproute2
_NAME = re.compile(r"swarm-lab-(?P<pid>\d+)-\d+-.+")
_CLONE_NEWNET = 0x40000000
_REMOVAL_TIMEOUT_S = 5.0
_libc = ctypes.CDLL(None, use_errno=True)


def namespace_name(laboratory: int, host: str) -> str:
    """The name of a namespace of this process; :func:`sweep` reads the process id in it."""
    return f"swarm-lab-{os.getpid()}-{laboratory}-{host}"


def add_namespace(name: str) -> None:
    """Make a namespace with a working loopback. Raises RuntimeError with what ``ip`` said."""
    ip("netns", "add", name)
    ip("-n", name, "link", "set", "lo", "up")


def remove_namespaces(names: Collection[str], *, spare: Collection[int] = ()) -> None:
    """Kill what lives in these namespaces and remove them; gone ones are no error.

    This process, and those with the ids `spare`, live on even if they are inside.
    """
    deadline = time.monotonic() + _REMOVAL_TIMEOUT_S
    while (pids := _processes_in(names, {os.getpid(), *spare})) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    for name in names:
        if (_DIRECTORY / name).exists():
            with contextlib.suppress(RuntimeError):  # somebody else was quicker
                ip("netns", "delete", name)


def sweep() -> None:
    """Remove what laboratories of dead processes have left."""
    matches = [_NAME.fullmatch(path.name) for path in _DIRECTORY.glob("*")]
    remove_namespaces([match[0] for match in matches if match and not psutil.pid_exists(int(match["pid"]))])


@contextlib.contextmanager
def inside(name: str) -> Iterator[None]:
    """Move the calling thread into a namespace, and back at the end.

    Processes and threads that it starts meanwhile are in the namespace too, and stay there.
    """
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        entrance(name)()
        try:
            yield
        finally:
            _set_namespace(home)
    finally:
        os.close(home)


def entrance(name: str) -> Callable[[], None]:
    """A function that moves the thread that calls it into a namespace; also fit for ``preexec_fn``."""
    path = bytes(_DIRECTORY / name)

    def enter() -> None:
        descriptor = os.open(path, os.O_RDONLY)
        _set_namespace(descriptor)
        os.close(descriptor)

    return enter


def ip(*arguments: str, lines: str = "") -> None:
    """Run iproute2's ``ip``, with `lines` as its input. Raises RuntimeError with what it said."""
    result = subprocess.run(["ip", *arguments], input=lines, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"`ip {' '.join(arguments)}` failed: {(result.stderr or result.stdout).strip()}")


def _set_namespace(descriptor: int) -> None:
    if _libc.setns(descriptor, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, f"setns failed: {os.strerror(number)}")


def _processes_in(names: Collection[str], spare: Collection[int]) -> list[int]:
    namespaces = set()
    for name in names:
        with contextlib.suppress(OSError):
            namespaces.add((_DIRECTORY / name).stat().st_ino)
    pids = []
    for pid in psutil.pids() if namespaces else []:
        with contextlib.suppress(OSError):  # it has ended
            if pid not in spare and Path(f"/proc/{pid}/ns/net").stat().st_ino in namespaces:
                pids.append(pid)
    return pids
