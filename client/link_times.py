"""How far servers are from this client: asked before the first route, then learned from the pings of sessions."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import deque
from collections.abc import Collection

from swarm.dht import Announcement
from swarm.errors import SwarmError
from swarm.protocol.messages import STREAM_PROTOCOL, Ping, Pong
from swarm.protocol.wire import Wire
from swarm.transport.node import Node
from swarm.transport.outgoing import write

LEAST_RTT_S = 0.005
"""Shorter round trips are not told apart: how busy a processor is makes more difference."""
_ASK_AT_ONCE = 8
"""So many servers are asked before a route is chosen; the ways to others are guessed from theirs."""
_PATIENCE_S = 1.0
_TRIPS = 12
"""Round trips that dialling a stranger and a few pings take together: a server that was not done when patience ended is
at least so far."""
_PINGS = 4
_REMEMBERED = 8
_TICK_S = 0.005
_FORGETTING = 0.05
_READ_BYTES = 4096
_FAILURES = (SwarmError, OSError, EOFError)


class LinkTimes:
    """Round trips to servers, in seconds, for one event loop."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._asked: set[str] = set()
        self._asking = asyncio.Lock()
        self._recent: dict[str, deque[float]] = {}
        self._late_s: dict[str, float] = {}
        self.rtts_s: dict[str, float] = {}
        """By peer id, no less than `LEAST_RTT_S`."""

    @property
    def doubts_s(self) -> dict[str, float]:
        """By how much each of them may be off: as far as the usual ping is from the shortest, and, until sessions have
        brought more pings, by as much as this event loop was late itself when it asked. Next to nothing, unless a
        machine or a way is busy: then near servers cannot be told apart."""
        return {peer_id: self._doubt_s(peer_id) for peer_id in self.rtts_s}

    async def ask(self, servers: Collection[Announcement]) -> None:
        """Ask some of those of which nothing is known, for a second at most."""
        async with self._asking:
            strangers = [one for one in servers if one.peer_id not in self.rtts_s and one.peer_id not in self._asked]
            strangers = strangers[:_ASK_AT_ONCE]
            self._asked.update(one.peer_id for one in strangers)
            if not strangers:
                return
            late_s = list[float]()
            watching = asyncio.create_task(_watch_lateness(late_s))
            try:
                async with asyncio.TaskGroup() as tasks:
                    for server in strangers:
                        tasks.create_task(self._ask(server))
            finally:
                watching.cancel()
            if late_s:
                self._late_s.update(dict.fromkeys((one.peer_id for one in strangers), statistics.fmean(late_s)))

    def heard(self, peer_id: str, rtt_s: float) -> None:
        """A ping took so long. The shortest counts, as others waited for something else; but it fades."""
        rtt_s, known_s = max(rtt_s, LEAST_RTT_S), self.rtts_s.get(peer_id)
        self._recent.setdefault(peer_id, deque(maxlen=_REMEMBERED)).append(rtt_s)
        far = known_s is not None and rtt_s > known_s
        self.rtts_s[peer_id] = known_s + _FORGETTING * (rtt_s - known_s) if far and known_s is not None else rtt_s

    def _doubt_s(self, peer_id: str) -> float:
        recent = self._recent.get(peer_id, ())
        late_s = self._late_s.get(peer_id, 0.0) if len(recent) <= _PINGS else 0.0
        return max(late_s, statistics.fmean(recent) - min(recent) if recent else 0.0)

    async def _ask(self, server: Announcement) -> None:
        try:
            async with asyncio.timeout(_PATIENCE_S):
                await self._node.connect(server.peer_id, server.addresses)
                reader, writer = await self._node.open_stream(server.peer_id, STREAM_PROTOCOL)
                try:
                    wire = Wire()
                    for _ in range(_PINGS):
                        self.heard(server.peer_id, await _ping(wire, reader, writer))
                finally:
                    writer.close()
        except TimeoutError:
            self.rtts_s.setdefault(server.peer_id, _PATIENCE_S / _TRIPS)
        except _FAILURES:
            return  # who cannot be reached shows when a session wants it


async def _watch_lateness(late_s: list[float]) -> None:
    """Note how late this event loop wakes us, in seconds, again and again."""
    while True:
        due = time.monotonic() + _TICK_S
        await asyncio.sleep(_TICK_S)
        late_s.append(max(0.0, time.monotonic() - due))


async def _ping(wire: Wire, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> float:
    begun = time.monotonic()
    wire.send(Ping())
    write(writer, wire.take_outgoing())
    while data := await reader.read(_READ_BYTES):
        if any(isinstance(message, Pong) for message, _ in wire.receive(data)):
            return time.monotonic() - begun
    raise EOFError
