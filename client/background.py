"""An event loop on a thread of its own, so that the client works from plain code, threads, and running loops."""

from __future__ import annotations

import asyncio
import atexit
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

import uvloop

T = TypeVar("T")
_STOP_TIMEOUT_S = 2.0


class BackgroundLoop:
    """Runs coroutines on a daemon thread and hands back their results."""

    _shared: BackgroundLoop | None = None
    _shared_lock = threading.Lock()

    def __init__(self) -> None:
        self.loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="swarm-client", daemon=True)
        self._thread.start()
        # A thread that the interpreter has to break off while it ends may take the process down with it.
        atexit.register(self._stop)

    @classmethod
    def shared(cls) -> BackgroundLoop:
        """The process's one loop."""
        with cls._shared_lock:
            if cls._shared is None or not cls._shared._thread.is_alive():
                cls._shared = cls()
            return cls._shared

    @classmethod
    def start_anew(cls) -> None:
        """Let the next client have a loop of its own: a thread stays in the network namespace where it was started."""
        with cls._shared_lock:
            cls._shared = None

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

    def _stop(self) -> None:
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._end(), self.loop)
        self._thread.join(timeout=_STOP_TIMEOUT_S)

    async def _end(self) -> None:
        """As ``asyncio.run()`` ends: nothing that is under way, such as a time limit of hivemind's, is left behind."""
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.loop.stop()
