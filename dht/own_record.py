"""A record of this peer's own in the DHT, published again and again."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass

from swarm.dht.keepers import nearest_nodes
from swarm.transport.lean_hivemind import DHTID, DHTNode, DHTRecord, PeerID

_KEEPERS_KNOWN_FOR_S = 20.0
"""Looking up who keeps a key costs several times what storing a record with them does. Who comes nearer to the key
meanwhile is told by those who have the record."""


@dataclass(frozen=True)
class _Keepers:
    """Nodes that are to keep `key`, nearest first, and others in case these are gone; found at ``time.monotonic()``."""

    key: str
    nodes: dict[DHTID, PeerID]
    found_at: float


class OwnRecord:
    """What this peer says under one subkey, its peer id; each time it is stored, it replaces what was said before."""

    def __init__(self, dht: DHTNode, lease_s: float) -> None:
        """
        Args:
            lease_s: how long others believe it, in seconds, unless it is stored again.
        """
        self._dht, self._lease_s = dht, lease_s
        self._last_expiration = 0.0
        self._keepers: _Keepers | None = None

    async def store(self, key: str, peer_id: str, packed: bytes) -> bool:
        """Say `packed` under `key` for one lease; returns whether at least one node of the DHT stored it."""
        key_id = DHTID.generate(source=key)
        nearest = await self._nearest(key, key_id)
        # The DHT keeps the record that expires last, so a later one must expire later.
        self._last_expiration = max(time.time() + self._lease_s, self._last_expiration + 1e-3)
        record = self._signed(key_id, peer_id, packed)
        untried = iter(nearest.items())
        async with asyncio.TaskGroup() as tasks:
            replicas = [
                tasks.create_task(self._store_once(record, key_id, peer_id, untried))
                for _ in range(self._dht.num_replicas)
            ]
        return any(replica.result() for replica in replicas)

    async def _nearest(self, key: str, key_id: DHTID) -> dict[DHTID, PeerID]:
        known, now = self._keepers, time.monotonic()
        if known is not None and known.key == key and now < known.found_at + _KEEPERS_KNOWN_FOR_S:
            return known.nodes
        nodes = await nearest_nodes(self._dht, key_id)
        are_enough = len(nodes) > self._dht.num_replicas  # fewer are no trouble to find, and more may come any moment
        self._keepers = _Keepers(key, nodes, now) if are_enough else None
        return nodes

    async def _store_once(
        self, record: DHTRecord, key_id: DHTID, peer_id: str, untried: Iterator[tuple[DHTID, PeerID]]
    ) -> bool:
        """Store one replica, on the first of the nodes that answers; returns whether that took it."""
        protocol = self._dht.protocol
        for node_id, node_peer_id in untried:
            if node_id == self._dht.node_id:
                is_valid: bool = protocol.record_validator.validate(record)
                return is_valid and bool(
                    protocol.storage.store(key_id, record.value, record.expiration_time, subkey=peer_id)
                )
            stored = await protocol.call_store(
                node_peer_id, [key_id], [record.value], [record.expiration_time], [peer_id]
            )
            if stored is not None:
                return bool(stored[0])
            self._keepers = None  # there may be news of more than this one
        return False

    def _signed(self, key_id: DHTID, peer_id: str, packed: bytes) -> DHTRecord:
        protocol = self._dht.protocol
        dumps = protocol.serializer.dumps
        record = DHTRecord(key_id.to_bytes(), dumps(peer_id), dumps(packed), self._last_expiration)
        return dataclasses.replace(record, value=protocol.record_validator.sign_value(record))
