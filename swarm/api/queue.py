"""Who is served next: a number of places, and a line for each caller, served in turns."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class QueueFull(Exception):
    """There are too many in line.

    Attributes:
        retry_after_s: when it is worth asking again.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Queue:
    """Places for requests that run, and lines of those that wait: callers take turns, whoever asked for how much.

    Args:
        places: how many may run at once.
        waiting: how many may wait, of all callers together; of one caller at most half of them.
        patience_s: how long one may wait.
    """

    def __init__(self, places: int, waiting: int, patience_s: float) -> None:
        self.places, self.most_waiting, self.patience_s = places, waiting, patience_s
        self.running = 0
        self._lines: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        self._mean_stay_s = 5.0

    @property
    def waiting(self) -> int:
        """How many are in line."""
        return sum(len(line) for line in self._lines.values())

    @property
    def retry_after_s(self) -> float:
        """When a place is likely to be free for one who comes last."""
        return min(60.0, max(1.0, self._mean_stay_s * (self.waiting + 1) / self.places))

    @asynccontextmanager
    async def place(self, caller: str) -> AsyncIterator[None]:
        """A place, for as long as the context lasts.

        Raises:
            QueueFull: too many are in line, or the wait was too long.
        """
        if self.running >= self.places or self._lines:
            await self._wait(caller)
        else:
            self.running += 1
        loop = asyncio.get_running_loop()
        begun = loop.time()
        try:
            yield
        finally:
            self._mean_stay_s += 0.1 * (loop.time() - begun - self._mean_stay_s)
            self.running -= 1
            self._call_next()

    async def _wait(self, caller: str) -> None:
        line = self._lines.get(caller, deque())
        if self.waiting >= self.most_waiting or len(line) >= max(1, self.most_waiting // 2):
            raise QueueFull(
                f"{self.running} requests are being answered and {self.waiting} wait; come back later",
                self.retry_after_s,
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._lines.setdefault(caller, line).append(turn)
        try:
            async with asyncio.timeout(self.patience_s):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():  # it was called just then: the place goes to the next
                self.running -= 1
                self._call_next()
            else:
                self._leave(caller, turn)
            if isinstance(error, TimeoutError):
                raise QueueFull(f"no place became free within {self.patience_s:g} s", self.retry_after_s) from None
            raise

    def _leave(self, caller: str, turn: asyncio.Future[None]) -> None:
        line = self._lines.get(caller, deque())
        if turn in line:
            line.remove(turn)
        if not line:
            self._lines.pop(caller, None)

    def _call_next(self) -> None:
        while self.running < self.places and self._lines:
            caller, line = self._lines.popitem(last=False)
            turn = line.popleft()
            if line:
                self._lines[caller] = line  # at the end: others' turn comes first
            if not turn.done():
                self.running += 1
                turn.set_result(None)
