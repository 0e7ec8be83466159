"""An event loop on a thread of its own, so that the client works from plain code, threads, and running loops."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

import uvloop

T = TypeVar("T")


class BackgroundLoop:
    """Runs coroutines on a daemon thread and hands back their results."""

    _shared: BackgroundLoop | None = None
    _shared_lock = threading.Lock()

    def __init__(self) -> None:
        self.loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="swarm-client", daemon=True)
        self._thread.start()

    @classmethod
    def shared(cls) -> BackgroundLoop:
        """The process's one loop."""
        with cls._shared_lock:
            if cls._shared is None or not cls._shared._thread.is_alive():
                cls._shared = cls()
            return cls._shared

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run `coroutine` and wait for its result; an interrupt (Ctrl-C) cancels it."""
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError("swarm's blocking API was called from inside its own event loop")
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def submit(self, coroutine: Coroutine[Any, Any, object]) -> None:
        """Run `coroutine` without waiting, for clean-up when an object is collected."""
        if self._thread.is_alive() and not self.loop.is_closed():
            asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        else:
            coroutine.close()
