"""The sessions of one client that wait for room on servers that are full, in the order in which they came.

Only the first of them asks; so servers are asked no more often however many wait, and nobody is overtaken within a
client.
"""

from __future__ import annotations

import asyncio
import contextlib


class WaitingLine:
    """For one event loop. Whoever joins must :meth:`leave`, whether there was room or not."""

    def __init__(self) -> None:
        self._events: dict[object, asyncio.Event] = {}  # in the order of joining

    def is_first(self, session: object) -> bool:
        """Whether nobody (else) has waited longer; so it is also for one that has not joined an empty line."""
        return next(iter(self._events), session) is session

    def join(self, session: object) -> None:
        """At the end; one that stands in the line already keeps its place."""
        self._events.setdefault(session, asyncio.Event())

    def leave(self, session: object) -> None:
        """It has room, or wants none any more."""
        if self._events.pop(session, None) is not None:
            self.news()

    def news(self) -> None:
        """There may be room now: wake the first."""
        if self._events:
            next(iter(self._events.values())).set()

    async def wait(self, session: object, at_most_s: float) -> None:
        """Until there are news and `session` is the first, or `at_most_s` has passed."""
        event = self._events[session]
        event.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(at_most_s):
                await event.wait()
