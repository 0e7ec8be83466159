"""Keep a record of this server in the directory: made anew for every renewal, and found again if the swarm was lost.

Now and then, and when it leaves, also its listing among all models."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

from swarm.dht import RENEWAL_S, Announcement, Directory, ExpertAnnouncement, ModelListing, State
from swarm.dht.model_listing import LISTING_RENEWAL_S, expert_runs
from swarm.errors import SwarmError
from swarm.transport.node import Node

logger = logging.getLogger(__name__)

Record = TypeVar("Record", Announcement, ExpertAnnouncement)


class Announcer(Generic[Record]):
    """What a server says of itself, said again and again."""

    def __init__(
        self,
        node: Node,
        directory: Directory,
        initial_peers: Sequence[str],
        make: Callable[[tuple[str, ...]], Record],
        num_blocks: int,
        expert_counts: Mapping[int, int],
    ) -> None:
        """
        Args:
            make: given this peer's addresses, makes the record as it is now.
            num_blocks: of the model.
            expert_counts: routed experts of the blocks whose experts may be elsewhere.
        """
        self._node, self._directory, self._initial_peers = node, directory, initial_peers
        self._make: Callable[[tuple[str, ...]], Record] = make
        self._num_blocks, self._experts = num_blocks, expert_runs(expert_counts)
        self._listed_at = float("-inf")
        self._renew = asyncio.Event()
        self._one_at_a_time = asyncio.Lock()

    def renew_soon(self) -> None:
        """Something has changed, and there is no hurry: :meth:`keep_announced` will say so."""
        self._renew.set()

    async def announce(self) -> tuple[Record, bool]:
        """Tell everybody now; returns what was said, and whether any node of the directory stored it."""
        async with self._one_at_a_time:  # what was made first must not be stored last
            record = self._make(tuple((await self._node.addresses())[:8]))
            stored = await self._directory.announce(record)
            await self._list(record)
            return record, stored

    async def keep_announced(self) -> None:
        """Renew the record for ever; find the way back into the swarm if it is lost."""
        while True:
            self._renew.clear()
            try:
                _, stored = await self.announce()
                if self._initial_peers and self._directory.is_alone():
                    logger.warning("no other peer is in sight; trying the initial peers again")
                    await self._directory.rejoin(self._initial_peers)
                elif not stored:
                    logger.warning("the announcement was not stored; trying again in %.0f s", RENEWAL_S)
            except SwarmError as error:
                logger.warning("could not announce: %s", error)
            try:
                async with asyncio.timeout(RENEWAL_S):
                    await self._renew.wait()
            except TimeoutError:
                pass

    async def _list(self, record: Record) -> None:
        """Say that there is this model, or withdraw that, if it is time to."""
        leaves, now = record.state is State.OFFLINE, time.monotonic()
        if not leaves and now - self._listed_at < LISTING_RENEWAL_S:
            return
        listing = ModelListing(
            peer_id=record.peer_id,
            model=record.model,
            model_name=record.model_name,
            num_blocks=self._num_blocks,
            experts=self._experts,
            withdrawn=leaves,
            issued_at=time.time(),
        )
        if await self._directory.list_model(listing):
            self._listed_at = now
