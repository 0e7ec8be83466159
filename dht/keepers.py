"""The nodes of the DHT that keep a key: find them, and read from some of them what they keep.

hivemind's ``store`` and ``get`` look for these nodes by asking for the key itself, and whoever keeps the key sends all
of its records along: of 1,000 servers more than a megabyte, from each keeper, for every renewal and every look-up. So
the way is asked beside the key, where nothing can be stored, and the records of as many keepers as are needed.
"""

from __future__ import annotations

import asyncio
from typing import Any

from swarm.transport.lean_hivemind import DHTID, DHTNode, DHTRecord, PeerID

_READ_FROM = 3
"""Keepers whose word is taken together: one may have just come, one may conceal."""
_SMALL_BYTES = 128 * 1024
"""Where records are so few, more nodes are asked: in a small swarm, or a new one, everybody may know of somebody."""


async def nearest_nodes(dht: DHTNode, key_id: DHTID) -> dict[DHTID, PeerID]:
    """The nodes that are to keep a key, and some more in case these are gone, nearest first; none of them is asked for
    what it keeps."""
    beside = DHTID(int(key_id) ^ 1)  # as far from every node, but for the last bit
    search = asyncio.create_task(dht.find_nearest_nodes([beside], exclude_self=dht.protocol.client_mode))
    # A search that is broken off leaves tasks behind that wait for its end for ever.
    found: dict[DHTID, dict[DHTID, PeerID]] = await asyncio.shield(search)
    return found[beside]


async def records(dht: DHTNode, key: str) -> dict[str, tuple[bytes, float]]:
    """What peers say under `key`: by subkey, what was said and until when (Unix time) that is valid."""
    key_id = DHTID.generate(source=key)
    kept: dict[str, tuple[bytes, float]] = {}
    _merge(kept, dht.protocol.storage.get(key_id))
    nearest = await nearest_nodes(dht, key_id)
    others = [one for node_id, one in nearest.items() if node_id != dht.node_id and one not in dht.blacklist]
    await _read(dht, key_id, others[:_READ_FROM], kept)
    if sum(len(value) for value, _ in kept.values()) < _SMALL_BYTES:
        await _read(dht, key_id, others[_READ_FROM:], kept)
    return {subkey: (_said(dht, key_id, subkey, *record), record[1]) for subkey, record in kept.items()}


async def _read(dht: DHTNode, key_id: DHTID, peer_ids: list[PeerID], kept: dict[str, tuple[bytes, float]]) -> None:
    """Add what these nodes keep to `kept`."""
    for answer in await asyncio.gather(*(dht.protocol.call_find(peer_id, [key_id]) for peer_id in peer_ids)):
        if answer is not None:
            _merge(kept, answer[key_id][0])


def _merge(kept: dict[str, tuple[bytes, float]], found: Any) -> None:
    """Add records; of two under one subkey the one that expires last counts. A plain value is nothing of ours."""
    if found is None or isinstance(found.value, bytes):
        return
    for subkey, (value, expiration) in found.value.items():
        if subkey not in kept or kept[subkey][1] < expiration:
            kept[subkey] = (value, expiration)


def _said(dht: DHTNode, key_id: DHTID, subkey: str, value: bytes, expiration: float) -> bytes:
    """A record's value without its signature."""
    protocol = dht.protocol
    record = DHTRecord(key_id.to_bytes(), protocol.serializer.dumps(subkey), value, expiration)
    said: bytes = protocol.serializer.loads(protocol.record_validator.strip_value(record))
    return said
