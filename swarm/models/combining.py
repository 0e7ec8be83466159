"""Run calls that several threads make at the same time as one.

Whoever comes first begins at once, unless others are known to be on their way (:meth:`Combiner.expect`), or came
together the last time (:class:`Company`). Those who come meanwhile wait, and one of them then runs the calls of all
(Hendler et al. 2010, "Flat combining and the synchronization-parallelism tradeoff").
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

_MOST_PATIENCE_S = 0.005
"""For those who are expected: they have little to do before they call, or something has become of them."""

_PATIENCE = 0.25
"""For those who came together the last time, as a part of what a run takes."""

W = TypeVar("W")
R = TypeVar("R")


@dataclass
class Company:
    """Those who ran together are likely to come together again, and all of them cost little more than one: for as many
    it is worth waiting, as long as one comes shortly after the other. If fewer come, one less is waited for the next
    time."""

    patience: float
    """From one to the next, as a part of what a run takes."""
    count: int = 1
    """So many are waited for."""
    patience_s: float = 0.0
    """How long to wait for the next one."""

    def met(self, count: int, took_s: float) -> None:
        """So many ran together, which took so long."""
        self.count, self.patience_s = max(count, self.count - 1), self.patience * took_s


@dataclass(eq=False)
class _Call(Generic[W, R]):
    work: W
    woken: threading.Event = field(default_factory=threading.Event)
    leads: bool = False
    """It is its thread's turn to run all that wait."""
    results: tuple[R, ...] = ()
    """One, once it is there."""


class Combiner(Generic[W, R]):
    """Calls of one function that takes many pieces of work as well as one. For any number of threads."""

    def __init__(self, run: Callable[[Sequence[W]], Sequence[R]], most: int) -> None:
        """
        Args:
            run: a result for every piece of work, in their order.
            most: pieces of work to run as one.
        """
        self._run, self._most = run, most
        self._lock = threading.Lock()
        self._all_here = threading.Condition(self._lock)
        self._expected: set[int] = set()  # threads
        self._waiting: deque[_Call[W, R]] = deque()
        self._busy = False
        self._company = Company(_PATIENCE)

    def expect(self, thread: int) -> None:
        """The thread with this identifier (``threading.get_ident()``) is about to call: it is worth a moment's wait."""
        with self._lock:
            self._expected.add(thread)

    def do_not_expect(self, thread: int) -> None:
        """It has called, or will not."""
        with self._lock:
            self._arrived(thread)

    @property
    def has_company(self) -> bool:
        """Whether somebody calls now, is expected to, or may come together with whoever calls next."""
        return self._busy or bool(self._expected) or self._company.count > 1

    def __call__(self, work: W) -> R:
        """The result for `work`. Raises what `run` raises for it alone: what others asked for is not its fault."""
        call: _Call[W, R] = _Call(work)
        with self._lock:
            self._waiting.append(call)
            self._arrived(threading.get_ident())
            call.leads, self._busy = not self._busy, True
        try:
            if not call.leads:
                call.woken.wait()
            if call.leads:
                self._run_all()
        finally:
            self._leave(call)
        return call.results[0] if call.results else self._run([work])[0]

    def _run_all(self) -> None:
        """Run what waits now; those it was not run for (it raised, or this thread was interrupted) run their own."""
        calls: list[_Call[W, R]] = []
        try:
            with self._lock:
                self._wait_for_others()
                calls += [self._waiting.popleft() for _ in range(min(self._most, len(self._waiting)))]
            begun = time.monotonic()
            for call, result in zip(calls, self._run([call.work for call in calls]), strict=True):
                call.results = (result,)
            self._company.met(len(calls), time.monotonic() - begun)
        except Exception:
            if len(calls) == 1:
                raise
        finally:
            self._pass_on()
            for call in calls:
                call.woken.set()

    def _arrived(self, thread: int) -> None:
        self._expected.discard(thread)
        if not self._expected:
            self._all_here.notify()

    def _wait_for_others(self) -> None:
        until = time.monotonic() + _MOST_PATIENCE_S
        while (came := len(self._waiting)) < self._most:
            if self._expected:
                if not self._all_here.wait(until - time.monotonic()):
                    self._expected.clear()
            elif came >= self._company.count:
                return
            else:
                self._all_here.wait(self._company.patience_s)
                if len(self._waiting) == came and not self._expected:
                    return

    def _pass_on(self) -> None:
        """Let the first of those who wait run all of them."""
        with self._lock:
            self._busy = bool(self._waiting)
            if self._waiting:
                self._waiting[0].leads = True
                self._waiting[0].woken.set()

    def _leave(self, call: _Call[W, R]) -> None:
        """`call` is over; if its thread was interrupted while it waited, others must not wait for it."""
        with self._lock:
            if call not in self._waiting:
                return
            self._waiting.remove(call)
        if call.leads:
            self._pass_on()
