"""Run the watch on a thread of its own: reading a thousand announcements must not keep a page waiting."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Coroutine
from typing import Any

import uvloop

logger = logging.getLogger(__name__)


class BackgroundTask:
    """One coroutine on one thread, begun at once. :meth:`stop` it."""

    def __init__(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self._loop = uvloop.new_event_loop()
        self._task: asyncio.Task[None] | None = None
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(coroutine,), name="swarm-health", daemon=True)
        self._thread.start()
        self._begun.wait()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Cancel it and wait for its end."""
        assert self._task is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(timeout_s)

    def _run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            try:
                runner.run(self._main(coroutine))
            except asyncio.CancelledError:
                logger.debug("the watch was stopped")
            except Exception:
                logger.exception("the watch has failed")

    async def _main(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self._task = asyncio.current_task()
        self._begun.set()
        await coroutine
