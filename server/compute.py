"""The thread that owns the device. Everything that touches weights or caches runs here, one thing at a time."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Timed:
    """How long a piece of work waited, and how long it took, in seconds."""

    queue_s: float
    compute_s: float


class ComputeThread:
    """Runs functions one after another, in the order in which they were submitted; what can wait waits."""

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads
        self._waiting: list[tuple[bool, int, Callable[[], Any], asyncio.Future[Any]]] = []
        self._count = itertools.count()
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="compute", daemon=True)
        self._thread.start()

    async def run(self, work: Callable[[], T], *, can_wait: bool = False) -> tuple[T, Timed]:
        """Run `work` on the thread. If the caller is cancelled, work that has begun still finishes.

        Args:
            can_wait: run it when there is nothing else to do.
        """
        submitted = time.perf_counter()

        def timed() -> tuple[T, Timed]:
            begun = time.perf_counter()
            result = work()
            return result, Timed(begun - submitted, time.perf_counter() - begun)

        future: asyncio.Future[tuple[T, Timed]] = asyncio.get_running_loop().create_future()
        with self._changed:
            heapq.heappush(self._waiting, (can_wait, next(self._count), timed, future))
            self._changed.notify()
        return await future

    def stop(self) -> None:
        """Drop what has not begun."""
        with self._changed:
            self._stopped = True
            self._waiting.clear()
            self._changed.notify()

    def _work(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._waiting)
                if self._stopped:
                    return
                _, _, work, future = heapq.heappop(self._waiting)
            if future.cancelled():
                continue
            try:
                result = work()
            except BaseException as error:
                _tell(future, future.set_exception, error)
            else:
                _tell(future, future.set_result, result)


def _tell(future: asyncio.Future[Any], tell: Callable[[Any], None], what: Any) -> None:
    def tell_unless_gone() -> None:
        if not future.done():
            tell(what)

    with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any more
        future.get_loop().call_soon_threadsafe(tell_unless_gone)
