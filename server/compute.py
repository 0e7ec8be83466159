"""The thread that owns the device. Everything that touches weights or caches runs here, one thing at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Timed:
    """How long a piece of work waited, and how long it took, in seconds."""

    queue_s: float
    compute_s: float


class ComputeThread:
    """Runs functions one after another, in the order in which they were submitted."""

    def __init__(self, threads: int | None = None) -> None:
        self._pool = ThreadPoolExecutor(1, "compute", initializer=_use_threads, initargs=(threads,))
        self.waiting = 0
        """How many pieces of work are queued or running."""

    async def run(self, work: Callable[[], T]) -> tuple[T, Timed]:
        """Run `work` on the thread. If the caller is cancelled, work that has begun still finishes."""
        submitted = time.perf_counter()

        def timed() -> tuple[T, Timed]:
            begun = time.perf_counter()
            result = work()
            return result, Timed(begun - submitted, time.perf_counter() - begun)

        self.waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, timed)
        finally:
            self.waiting -= 1

    def stop(self) -> None:
        """Drop what has not begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _use_threads(count: int | None) -> None:
    if count is not None:
        torch.set_num_threads(count)
