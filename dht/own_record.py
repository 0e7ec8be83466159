"""A record of this peer's own in the DHT, published again and again."""

from __future__ import annotations

import time

from swarm.transport.lean_hivemind import DHTNode


class OwnRecord:
    """What this peer says under one subkey, its peer id; each time it is stored, it replaces what was said before."""

    def __init__(self, dht: DHTNode, lease_s: float) -> None:
        """
        Args:
            lease_s: how long others believe it, in seconds, unless it is stored again.
        """
        self._dht, self._lease_s = dht, lease_s
        self._last_expiration = 0.0

    async def store(self, key: str, peer_id: str, packed: bytes) -> bool:
        """Say `packed` under `key` for one lease; returns whether at least one node of the DHT stored it."""
        # The DHT keeps the record that expires last, so a later one must expire later.
        self._last_expiration = max(time.time() + self._lease_s, self._last_expiration + 1e-3)
        stored: bool = await self._dht.store(
            key=key, subkey=peer_id, value=packed, expiration_time=self._last_expiration
        )
        return stored
