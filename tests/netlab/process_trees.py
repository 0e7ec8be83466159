"""Signals to a process and all its descendants: a server has a ``p2pd``."""

from __future__ import annotations

import contextlib
import signal
import subprocess

import psutil

Process = subprocess.Popen[str] | subprocess.Popen[bytes] | int
"""A child, or the process id of anything."""


def freeze(process: Process) -> None:
    """Stop it and its descendants, as if the machine had hung. The kernel still answers for its connections."""
    _signal(process, signal.SIGSTOP)


def thaw(process: Process) -> None:
    """Let it and its descendants go on."""
    _signal(process, signal.SIGCONT)


def kill(process: Process) -> None:
    """SIGKILL to it and its descendants: no farewell. A child is also waited for."""
    _signal(process, signal.SIGSTOP)  # so that none has offspring while we count them
    _signal(process, signal.SIGKILL)
    if isinstance(process, subprocess.Popen):
        process.wait()


def _signal(process: Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(process if isinstance(process, int) else process.pid)
        tree = [root, *root.children(recursive=True)]
        for member in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.send_signal(number)
