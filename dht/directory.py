"""The directory of a swarm's servers: publish one's own announcement, look up others'."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import TypeVar

from swarm.dht.announcement import CLOCK_SLACK_S, LEASE_S, Announcement, State, directory_key
from swarm.dht.expert_announcement import ExpertAnnouncement, experts_key
from swarm.dht.keepers import records
from swarm.dht.model_listing import LISTING_LEASE_S, MODELS_KEY, ModelListing
from swarm.dht.own_record import OwnRecord
from swarm.dht.validation import AnnouncementValidator
from swarm.errors import BootstrapFailed
from swarm.transport.lean_hivemind import DHTNode, PeerID
from swarm.transport.node import Node, PeerAddress

_Kind = TypeVar("_Kind", Announcement, ExpertAnnouncement)

_LEAVE_S = 2.0


class Directory:
    """This process's part of the DHT. Make it with :meth:`join`, end it with :meth:`leave`.

    Attributes:
        dht: hivemind's node, which runs in this process's own event loop.
    """

    def __init__(self, node: Node, dht: DHTNode) -> None:
        self._node = node
        self.dht = dht
        self._latest: dict[tuple[str, str], float] = {}
        """When what was last read of each (key, peer) had been issued."""
        self._own = OwnRecord(dht, LEASE_S)
        self._own_listing = OwnRecord(dht, LISTING_LEASE_S)

    @classmethod
    async def join(cls, node: Node, initial_peers: Sequence[str], *, client_only: bool = False) -> Directory:
        """Join the DHT through `initial_peers` (none: begin a new one).

        Raises:
            BootstrapFailed: no initial peer answered, or none of them keeps a Swarm directory.
        """
        reached = await node.bootstrap(initial_peers) if initial_peers else []
        try:
            dht = await DHTNode.create(
                p2p=node.p2p,
                initial_peers=reached or None,
                client_mode=client_only,
                record_validator=AnnouncementValidator(node.identity),
                cache_locally=False,
                cache_nearest=0,
                cache_on_store=False,
                blacklist_time=2.0,
                wait_timeout=2.0,
                strict=False,
            )
        except RuntimeError as error:
            raise BootstrapFailed(
                f"The initial peers are there, but none keeps a Swarm directory: {', '.join(reached)}"
            ) from error
        return cls(node, dht)

    async def announce(self, announcement: Announcement | ExpertAnnouncement) -> bool:
        """Publish this peer's announcement for one lease; it replaces the previous one.

        Returns:
            Whether at least one node of the DHT stored it.
        """
        key = (directory_key if isinstance(announcement, Announcement) else experts_key)(announcement.model)
        return await self._own.store(key, announcement.peer_id, announcement.pack())

    async def withdraw(self, announcement: Announcement) -> None:
        """Tell everybody that this server has left."""
        await self.announce(announcement.model_copy(update={"state": State.OFFLINE, "issued_at": time.time()}))

    async def list_model(self, listing: ModelListing) -> bool:
        """Publish that this peer hosts a model, for one (longer) lease; it replaces the previous listing.

        Returns:
            Whether at least one node of the DHT stored it.
        """
        return await self._own_listing.store(MODELS_KEY, listing.peer_id, listing.pack())

    async def models(self) -> list[ModelListing]:
        """What this swarm's servers say there is, one listing a server."""
        now, listings = time.time(), []
        for peer_id, (packed, expires_at) in (await self._records(MODELS_KEY)).items():
            try:
                listing = ModelListing.unpack(packed)
            except (ValueError, TypeError):
                continue
            if listing.peer_id == peer_id and not listing.withdrawn and expires_at >= now:
                listings.append(listing)
        return listings

    async def servers(self, model: str, *, departed: bool = False) -> list[Announcement]:
        """The servers of `model` that have not left, newest knowledge first-hand from the DHT.

        Records that have run out, or that are older than one already seen from the same peer, are dropped.

        Args:
            departed: also the farewells of those that have just left; their state is OFFLINE.

        Raises:
            DaemonDied: nobody can be asked any more.
        """
        return await self._present(Announcement, directory_key(model), model, departed)

    async def experts(self, model: str, *, departed: bool = False) -> list[ExpertAnnouncement]:
        """Likewise the servers of its experts."""
        return await self._present(ExpertAnnouncement, experts_key(model), model, departed)

    async def _present(self, kind: type[_Kind], key: str, model: str, departed: bool) -> list[_Kind]:
        found = await self._records(key)
        now = time.time()
        present: list[_Kind] = []
        for peer_id, (packed, expires_at) in found.items():
            try:
                announcement = kind.unpack(packed)
            except (ValueError, TypeError):
                continue
            if expires_at < now or announcement.peer_id != peer_id or announcement.model != model:
                continue
            issued_at = announcement.issued_at
            if issued_at > now + CLOCK_SLACK_S or issued_at < self._latest.get((key, peer_id), 0.0):
                continue
            self._latest[key, peer_id] = issued_at
            if departed or announcement.state is not State.OFFLINE:
                present.append(announcement)
        self._forget(now)
        return present

    async def ping(self, peer_id: str) -> float | None:
        """Seconds of a round trip to another peer's part of the DHT; None: it did not answer within 2 s."""
        begun = time.perf_counter()
        answered = await self.dht.protocol.call_ping(PeerID.from_base58(peer_id), strict=False)
        return time.perf_counter() - begun if answered is not None else None

    def is_alone(self) -> bool:
        """Whether this node has lost sight of all others."""
        return not self.dht.protocol.routing_table.peer_id_to_uid

    async def rejoin(self, initial_peers: Sequence[str]) -> None:
        """Look for the way back through `initial_peers`.

        Raises:
            BootstrapFailed: none of them answered.
        """
        for address in await self._node.bootstrap(initial_peers):
            await self.dht.protocol.call_ping(PeerID.from_base58(PeerAddress(address).peer_id))

    async def leave(self) -> None:
        """Leave the DHT. Announcements that were not withdrawn run out by themselves."""
        with contextlib.suppress(Exception):  # the daemon may be gone already, and then nobody answers
            async with asyncio.timeout(_LEAVE_S):
                await self.dht.shutdown()

    async def _records(self, key: str) -> dict[str, tuple[bytes, float]]:
        found = await records(self.dht, key)
        self._node.check_daemon()  # without which nothing is found
        return found

    def _forget(self, now: float) -> None:
        stale = [key for key, issued_at in self._latest.items() if issued_at < now - 2 * LEASE_S - CLOCK_SLACK_S]
        for key in stale:
            del self._latest[key]
