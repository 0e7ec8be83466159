"""Where the watch puts what it sees and the web application takes it from: on different threads, neither waits."""

from __future__ import annotations

import asyncio
import threading

from swarm.health.presenting import Snapshot


class Board:
    """The latest snapshot."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._latest = Snapshot()
        self._waiting: dict[asyncio.Event, asyncio.AbstractEventLoop] = {}
        self._closed = False

    @property
    def latest(self) -> Snapshot:
        return self._latest

    @property
    def closed(self) -> bool:
        """There will be nothing new."""
        return self._closed

    def publish(self, snapshot: Snapshot) -> None:
        """Replace what is there; from any thread."""
        with self._lock:
            self._latest = snapshot
            self._wake()

    def close(self) -> None:
        """Nobody needs to wait any longer."""
        with self._lock:
            self._closed = True
            self._wake()

    async def newer_than(self, sequence: int) -> Snapshot:
        """The latest, as soon as it is newer than `sequence`; at once if the board is closed."""
        changed = asyncio.Event()
        with self._lock:
            if self._latest.sequence > sequence or self._closed:
                return self._latest
            self._waiting[changed] = asyncio.get_running_loop()
        try:
            await changed.wait()
        finally:
            with self._lock:
                self._waiting.pop(changed, None)
        return self._latest

    def _wake(self) -> None:
        for changed, loop in self._waiting.items():
            loop.call_soon_threadsafe(changed.set)
        self._waiting.clear()
