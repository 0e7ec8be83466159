"""What servers have in memory while something happens."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

import psutil

from swarm.commands.local_swarm import LocalPeer

_EVERY_S = 0.02


@contextlib.contextmanager
def watching_memory(servers: Sequence[LocalPeer]) -> Iterator[dict[str, int]]:
    """The most that each server had resident so far, its daemon included, in bytes, by the names of their logs."""
    highest = dict.fromkeys((server.log.name for server in servers), 0)
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_EVERY_S):
            for server in servers:
                held = _resident_bytes(psutil.Process(server.process.pid))
                highest[server.log.name] = max(highest[server.log.name], held)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield highest
    finally:
        over.set()
        thread.join()


def _resident_bytes(server: psutil.Process) -> int:
    """Of the server and the programs that it runs.

    A child that has just been forked, and not begun its program, has its parent's memory, which is not there twice.
    """
    held, program = server.memory_info().rss, server.exe()
    for child in server.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            if child.exe() != program:
                held += child.memory_info().rss
    return int(held)
