"""Publish one's own claim to move, look up others'."""

from __future__ import annotations

import time

from swarm.dht.announcement import CLOCK_SLACK_S
from swarm.dht.directory import Directory
from swarm.dht.keepers import records
from swarm.dht.move_claim import CLAIM_LEASE_S, MoveClaim, moves_key
from swarm.dht.own_record import OwnRecord
from swarm.placement import Move


class MoveClaims:
    """The claims of one model's servers, in the DHT of `directory`."""

    def __init__(self, directory: Directory, peer_id: str, model: str, num_blocks: int) -> None:
        self._dht, self._peer_id = directory.dht, peer_id
        self._model, self._num_blocks = model, num_blocks
        self._own = OwnRecord(directory.dht, CLAIM_LEASE_S)

    async def publish(self, move: Move) -> bool:
        """Claim `move`, of this peer, for one lease; it replaces the previous claim.

        Returns:
            Whether at least one node of the DHT stored it.
        """
        packed = MoveClaim.of(move, self._model, self._num_blocks, time.time()).pack()
        return await self._own.store(moves_key(self._model), self._peer_id, packed)

    async def alive(self) -> list[Move]:
        """What everybody claims now, this peer included; claims of another number of blocks are dropped."""
        found = await records(self._dht, moves_key(self._model))
        now = time.time()
        moves = []
        for peer_id, (packed, expires_at) in found.items():
            try:
                claim = MoveClaim.unpack(packed)
            except (ValueError, TypeError):
                continue
            if expires_at < now or claim.issued_at > now + CLOCK_SLACK_S:
                continue
            if (claim.peer_id, claim.model, claim.num_blocks) == (peer_id, self._model, self._num_blocks):
                moves.append(claim.move)
        return moves
