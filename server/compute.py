"""The thread that owns the device. Everything that touches weights or caches runs here, one thing at a time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from swarm.models.combining import Company
from swarm.protocol.served_actions import Spent
from swarm.server.schedule import Waiting, choose, may_grow

logger = logging.getLogger(__name__)

_PATIENCE = 1.0
"""To run one alone takes about as long as to run a few, so it is worth waiting as long for the next of them."""
_BESIDE_PROMPTS = 0.25
"""A part of that."""
_EXPECTED_WITHIN_S = 0.5
"""Whose beginning was recalled here may have to wait for the same on the next server, and longer than others do …"""
_PATIENCE_WITH_EXPECTED_S = 0.01
"""… but they come at once then: so long from one arrival to the next."""

T = TypeVar("T")
W = TypeVar("W")


@dataclass(eq=False)
class _Job:
    waiting: Waiting
    work: Any
    run: Callable[[Sequence[Any]], Sequence[Any]]
    future: asyncio.Future[Any]
    submitted: float


class ComputeThread:
    """Runs functions one after another, in the order that :mod:`swarm.server.schedule` gives them."""

    def __init__(self, threads: int | None = None) -> None:
        """Called in the thread of the event loop, to which torch is left with one core from now on: where it divides a
        copy of a few KB between two threads, each waits for the other, a millisecond and more on a busy machine.

        Args:
            threads: to compute with; None: torch's choice.
        """
        self._threads = threads or torch.get_num_threads()
        _use_threads(1)
        self._jobs: list[_Job] = []
        self._soon: list[Callable[[], object]] = []
        self._changed = threading.Condition()
        self._stopped = False
        self._failure: str | None = None
        self._watchers: list[asyncio.Future[str]] = []
        self._experts_s = 0.0
        self._company = Company(_PATIENCE)
        self._expected: dict[object, float] = {}  # who is about to come with short work, until when (time.monotonic())
        self._thread = threading.Thread(target=self._work_or_fail, name="compute", daemon=True)
        self._thread.start()

    async def run(self, work: Callable[[], T]) -> tuple[T, Spent]:
        """Run `work` on the thread. If the caller is cancelled, work that has begun still finishes."""
        return await self.run_with_others(work, lambda works: [one() for one in works], Waiting())

    async def run_with_others(
        self, work: W, run: Callable[[Sequence[W]], Sequence[T | Exception]], waiting: Waiting
    ) -> tuple[T, Spent]:
        """Run ``run([work])``, or as one call with works of the same group that wait at the same time.

        Args:
            run: the same function for all works of a group. An exception among its results is raised for that work; one
                that it raises, for all.
        """
        return await self.begin(work, run, waiting)

    def begin(
        self,
        work: W,
        run: Callable[[Sequence[W]], Sequence[T | Exception]],
        waiting: Waiting,
        whose: Hashable = None,
    ) -> asyncio.Future[tuple[T, Spent]]:
        """Likewise, without waiting for the result; `whose` work it is, if it was expected."""
        future: asyncio.Future[tuple[T, Spent]] = asyncio.get_running_loop().create_future()
        with self._changed:
            self._expected.pop(whose, None)
            if self._failure is None:
                self._jobs.append(_Job(waiting, work, run, future, time.perf_counter()))
                self._changed.notify()
            else:
                future.set_exception(RuntimeError(self._failure))
        return future

    def soon(self, errand: Callable[[], object]) -> None:
        """Have `errand` run on the thread before any work that is asked for later. Quick, and never fails."""
        with self._changed:
            self._soon.append(errand)
            self._changed.notify()

    def expect(self, whom: Hashable) -> None:
        """Somebody's short work is about to come: others are to wait a moment for it."""
        with self._changed:
            self._expected[whom] = time.monotonic() + _EXPECTED_WITHIN_S

    def expect_no_longer(self, whom: Hashable) -> None:
        """They have left."""
        with self._changed:
            self._expected.pop(whom, None)

    def waited(self, seconds: float) -> None:
        """Called by work, on the thread: it has waited so long for other machines."""
        self._experts_s += seconds

    async def failed(self) -> str:
        """Wait until the thread has ended by itself, which is a fault of ours: what was thrown there."""
        watcher: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        with self._changed:
            if self._failure is not None:
                return self._failure
            self._watchers.append(watcher)
        return await watcher

    def stop(self) -> None:
        """Drop what has not begun."""
        with self._changed:
            self._stopped = True
            self._jobs.clear()
            self._changed.notify()

    async def ended(self, within_s: float) -> bool:
        """After :meth:`stop`: wait for the work at hand, but no longer than this; whether it has ended."""
        await asyncio.to_thread(self._thread.join, within_s)
        return not self._thread.is_alive()

    def _work_or_fail(self) -> None:
        try:
            self._work()
        except BaseException as error:
            logger.exception("the thread that computes has failed")
            with self._changed:
                self._failure = f"{type(error).__name__}: {error}"
                jobs, self._jobs = self._jobs, []
            _tell([(watcher, self._failure) for watcher in self._watchers])
            _tell([(job.future, RuntimeError(self._failure)) for job in jobs])

    def _work(self) -> None:
        _use_threads(self._threads)
        owed_s = 0.0
        while jobs := self._next(prompts_first=owed_s > 0):
            begun, self._experts_s = time.perf_counter(), 0.0
            try:
                results = jobs[0].run([job.work for job in jobs])
            except BaseException as error:
                results = [error] * len(jobs)
            took_s = time.perf_counter() - begun
            if jobs[0].waiting.is_short:
                owed_s = took_s
                self._company.met(len(jobs), took_s)
            else:
                owed_s -= took_s
            spent = [Spent(begun - job.submitted, took_s, self._experts_s, len(jobs)) for job in jobs]
            told = [
                (job.future, result if isinstance(result, BaseException) else (result, how_long))
                for job, result, how_long in zip(jobs, results, spent, strict=True)
            ]
            _tell(told)

    def _next(self, *, prompts_first: bool) -> list[_Job]:
        """Wait for jobs, and take those to run now; none if the thread is to end."""
        with self._changed:
            while not self._stopped:
                for errand in self._soon:
                    errand()
                self._soon.clear()
                if self._jobs:
                    self._wait_for_company()
                self._jobs = [job for job in self._jobs if not job.future.cancelled()]
                if self._jobs:
                    chosen = choose([job.waiting for job in self._jobs], prompts_first=prompts_first)
                    jobs = [self._jobs[index] for index in chosen]
                    self._jobs = [job for job in self._jobs if job not in jobs]
                    return jobs
                self._changed.wait()
            return []

    def _wait_for_company(self) -> None:
        while not self._stopped:
            came, now = len(self._jobs), time.monotonic()
            self._expected = {whom: until for whom, until in self._expected.items() if until > now}
            if not may_grow([job.waiting for job in self._jobs], max(self._company.count, came + len(self._expected))):
                return
            self._changed.wait(self._patience_s())
            if len(self._jobs) == came:
                return

    def _patience_s(self) -> float:
        """How long to wait for the next one; a prompt that waits could run meanwhile."""
        share = 1.0 if all(job.waiting.is_short for job in self._jobs) else _BESIDE_PROMPTS
        return max(share * self._company.patience_s, _PATIENCE_WITH_EXPECTED_S if self._expected else 0.0)


def _use_threads(count: int) -> None:
    """From now on, in this thread."""
    torch.set_num_threads(count)
    torch.get_num_threads()  # else torch would look once more what the last thread has set that asked for a number


def _tell(results: Sequence[tuple[asyncio.Future[Any], Any]]) -> None:
    """Hand over the results of one batch, to each event loop in one go."""

    def tell(some: Sequence[tuple[asyncio.Future[Any], Any]]) -> None:
        for future, result in some:
            if future.done():  # nobody waits any more
                continue
            if isinstance(result, BaseException):
                future.set_exception(result)
            else:
                future.set_result(result)

    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], Any]]] = {}
    for future, result in results:
        by_loop.setdefault(future.get_loop(), []).append((future, result))
    for loop, some in by_loop.items():
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any more
            loop.call_soon_threadsafe(tell, some)
