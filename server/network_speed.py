"""Measure the ways to likely neighbours: rarely, a few at a time, and not while there is work to do."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Sequence

from swarm.dht import Announcement
from swarm.errors import PeerError
from swarm.server.neighbours import NetworkSpeed, latest, likely_neighbours, summarize
from swarm.transport.measuring import MeasuredLink, measure_link
from swarm.transport.node import Node

logger = logging.getLogger(__name__)

INTERVAL_S = 600.0
"""Between measurements, give or take `_JITTER`."""
FIRST_S = 5.0
"""After a server has come online; as long as there is nothing to say, it tries again after twice as long each time."""
_JITTER = 0.3
_BUSY_S = 15.0
_TRANSFERS = 3
"""With so many peers bandwidth is measured; with others only the round trip."""


class NetworkMeasurement:
    """What this server knows of its network; :meth:`run` it for as long as the server is online.

    Attributes:
        speed: the latest figures; empty as long as nobody else is there.
    """

    def __init__(
        self,
        node: Node,
        span: Callable[[], tuple[int, int]],
        find_servers: Callable[[], Awaitable[Sequence[Announcement]]],
        is_busy: Callable[[], bool],
        on_change: Callable[[NetworkSpeed], None],
    ) -> None:
        """
        Args:
            span: what this server hosts now.
            find_servers: looks up who hosts the model now.
            is_busy: whether sessions need the network; measuring waits for them.
            on_change: called with the new figures.
        """
        self.speed = NetworkSpeed()
        self._node, self._span = node, span
        self._find_servers, self._is_busy, self._on_change = find_servers, is_busy, on_change
        self._measured: dict[str, MeasuredLink] = {}

    async def run(self) -> None:
        """Measure now and then, for ever."""
        pause_s = FIRST_S
        while True:
            await asyncio.sleep(pause_s * random.uniform(1 - _JITTER, 1 + _JITTER))
            if self._is_busy():
                pause_s = _BUSY_S
                continue
            await self._measure()
            pause_s = INTERVAL_S if self.speed.rtts_s else min(2 * pause_s, INTERVAL_S)

    async def _measure(self) -> None:
        neighbours = likely_neighbours(self._node.peer_id, *self._span(), await self._find_servers())
        measured: dict[str, MeasuredLink] = {}
        transfers_left = _TRANSFERS
        for server in neighbours:
            link = await self._try(server, transfers=transfers_left > 0 and not self._is_busy())
            transfers_left -= link is not None and link.upload_bytes_per_s is not None
            if (known := latest(self._measured.get(server.peer_id), link)) is not None:
                measured[server.peer_id] = known
        self._measured = measured
        speed = summarize([server.peer_id for server in neighbours], measured)
        if speed != self.speed:
            self.speed = speed
            self._on_change(speed)

    async def _try(self, server: Announcement, *, transfers: bool) -> MeasuredLink | None:
        try:
            return await measure_link(self._node, server.peer_id, server.addresses, transfers=transfers)
        except PeerError as error:
            logger.debug("not measured: %s", error)
            return None
