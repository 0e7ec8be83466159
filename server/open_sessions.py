"""The sessions that are here now, and those that wait until another has brought what they begin with."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from swarm.server.sessions import HeldSession

GETS_ON_WITHIN_S = 1.0
"""What another session is about to bring is waited for as long as it computes something so often."""


class Brings(Protocol):
    """A session, as far as others wait for it."""

    def brings(self, held: HeldSession, prefix: Sequence[bytes], known: int) -> bool:
        """Whether it is at work on the next of the pages `prefix`, of which `held` would know so many."""
        ...


S = TypeVar("S", bound=Brings)


class OpenSessions(Generic[S]):
    """By token."""

    def __init__(self) -> None:
        self._sessions: dict[str, S] = {}
        self._none = asyncio.Event()
        self._none.set()
        self._progress = asyncio.Event()

    def __contains__(self, token: str) -> bool:
        return token in self._sessions

    def __getitem__(self, token: str) -> S:
        return self._sessions[token]

    def all(self) -> list[S]:
        """Those that are here now."""
        return list(self._sessions.values())

    def opened(self, token: str, session: S) -> None:
        """A session has begun."""
        self._sessions[token] = session
        self._none.clear()

    def closed(self, token: str) -> None:
        """A session is over."""
        del self._sessions[token]
        self.got_on()
        if not self._sessions:
            self._none.set()

    def got_on(self) -> None:
        """A session has computed something, or is over: who waits for what it computes may look again."""
        self._progress.set()
        self._progress = asyncio.Event()

    async def until_none(self) -> None:
        """Wait until no session is here any more."""
        await self._none.wait()

    async def wait_for_others(self, held: HeldSession, prefix: Sequence[bytes], within_s: float) -> None:
        """Wait until what other sessions are bringing of the pages `prefix` is known, as long as they get on."""
        prefix, until = held.of_use(prefix), time.monotonic() + within_s
        while (known := len(held.cache.known(prefix))) < len(prefix):
            if not any(other.brings(held, prefix, known) for other in self._sessions.values()):
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(GETS_ON_WITHIN_S, until - time.monotonic())):
                    await self._progress.wait()
            if time.monotonic() >= until:
                return
