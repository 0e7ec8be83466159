"""Answers over HTTP while they are made; whoever hangs up frees what was reserved for them at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable
from typing import Any, Generic, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from swarm.api.failures import RequestFailed

FIRST_PART_S = 2.0
"""An answer that fails within this time gets the status that fits; after that, 200 has been sent."""
KEEP_ALIVE_S = 5.0
"""So long a silence is filled, lest anybody between here and the client takes it for the end."""

T = TypeVar("T")


class Arriving(Generic[T]):
    """What a generator yields, with a say in how long to wait for it. Close it."""

    def __init__(self, parts: AsyncGenerator[T, None]) -> None:
        self._parts = parts
        self._next: asyncio.Task[T] | None = None

    async def ready(self, patience_s: float) -> bool:
        """Whether something has come, or an end, or a failure, within `patience_s`."""
        if self._next is None:
            self._next = asyncio.create_task(self._following())
        done, _ = await asyncio.wait([self._next], timeout=patience_s)
        return bool(done)

    async def take(self) -> T:
        """What has come. Raises StopAsyncIteration at the end, and what the generator raises."""
        task, self._next = self._next, None
        assert task is not None
        return await task

    async def failed_at_once(self) -> None:
        """Wait a moment for the first part; raise here what went wrong until then."""
        if not await self.ready(FIRST_PART_S) or self._next is None:
            return
        error = self._next.exception()
        if error is not None and not isinstance(error, StopAsyncIteration):
            await self.close()
            raise error

    async def close(self) -> None:
        """Stop the generator wherever it is, and wait until it has cleaned up."""
        if self._next is not None:
            self._next.cancel()
            await asyncio.gather(self._next, return_exceptions=True)
        await self._parts.aclose()

    async def _following(self) -> T:
        return await anext(self._parts)


class StreamedAnswer(StreamingResponse):
    """A response whose body comes from a generator that must be closed, whatever becomes of the client.

    Args:
        render: the text for a part.
        opening: before the first part.
        closing: after the last one.
        failed: if it breaks off.
        keep_alive: fills silences; empty: nothing does.
        lost: called if the client hung up before the end.
    """

    def __init__(
        self,
        arriving: Arriving[T],
        render: Callable[[T], Iterable[str]],
        *,
        opening: Callable[[], Iterable[str]] = tuple,
        closing: Callable[[], Iterable[str]] = tuple,
        failed: Callable[[RequestFailed], Iterable[str]],
        keep_alive: str,
        lost: Callable[[], None],
        media_type: str = "text/event-stream",
    ) -> None:
        self._arriving, self._render, self._failed = arriving, render, failed
        self._opening, self._closing, self._keep_alive, self._lost = opening, closing, keep_alive, lost
        self._complete = False
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._texts(), media_type=media_type, headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._arriving.close()
            if not self._complete:
                self._lost()

    async def _texts(self) -> AsyncIterator[str]:
        for text in self._opening():
            yield text
        while True:
            if not await self._arriving.ready(KEEP_ALIVE_S):
                if self._keep_alive:
                    yield self._keep_alive
                continue
            try:
                part = await self._arriving.take()
            except StopAsyncIteration:
                break
            except RequestFailed as failure:
                for text in self._failed(failure):
                    yield text
                self._complete = True
                return
            if text := "".join(self._render(part)):
                yield text
        for text in self._closing():
            yield text
        self._complete = True


async def unless_gone(request: Request, work: Coroutine[Any, Any, T], lost: Callable[[], None]) -> T:
    """The result of `work`, which ends as soon as the client hangs up. Raises RequestFailed then."""
    working = asyncio.create_task(work)
    gone = asyncio.create_task(_hangs_up(request))
    try:
        await asyncio.wait([working, gone], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        lost()
        raise RequestFailed(499, "client_error", "the client hung up")
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _hangs_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
