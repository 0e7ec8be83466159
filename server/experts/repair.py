"""Look now and then whether experts have no server at all, and have this server host them if others can spare it."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

from swarm.dht import Directory, State
from swarm.errors import SwarmError
from swarm.placement import ExpertHost, wanted_repair
from swarm.placement.expert_coverage import Experts
from swarm.placement.experts import lot
from swarm.server.experts.preparation import PreparedExperts
from swarm.server.settings import ServerSettings

logger = logging.getLogger(__name__)

_JITTER = 0.5


class Repair:
    """Decides; of several servers that could host the same, those go first that come first in :func:`lot`'s order."""

    def __init__(self, peer_id: str, directory: Directory, prepared: PreparedExperts, settings: ServerSettings) -> None:
        self._peer_id, self._directory, self._settings = peer_id, directory, settings
        self._model = prepared.checkpoint.model_digest
        self._shape, self._sizes = prepared.model_shape, prepared.expert_sizes
        self._room_bytes = prepared.room_bytes

    async def run(
        self,
        hosted: Callable[[], Experts],
        claim: Callable[[Experts], Awaitable[None]],
        carry_out: Callable[[Experts], Awaitable[bool]],
    ) -> None:
        """For ever.

        Args:
            hosted: what this server hosts now.
            claim: tells everybody what it is about to host instead; with nothing: that it stays, after all.
            carry_out: has it host this instead of what it hosts; False: that failed, and it hosts what it can.
        """
        failures = 0
        while True:
            pause_s = self._settings.rebalance_interval_s * random.uniform(1 - _JITTER, 1 + _JITTER)
            failed_s = self._settings.failed_move_pause_s * 2 ** min(failures - 1, 10) if failures else 0.0
            await asyncio.sleep(max(pause_s, failed_s))
            if (wanted := await self._claimed(hosted, claim)) is not None:
                failures = 0 if await carry_out(wanted) else failures + 1

    async def _claimed(
        self, hosted: Callable[[], Experts], claim: Callable[[Experts], Awaitable[None]]
    ) -> Experts | None:
        """What this server may host instead from now on; None: there is no need, or others go first."""
        try:
            wanted = await self._wanted(hosted(), claims_of=lambda _: True)
            if wanted is None:
                return None
            await claim(wanted)
            await asyncio.sleep(self._settings.claim_wait_s * random.uniform(1, 1 + _JITTER))
            if wanted == await self._wanted(hosted(), claims_of=self._goes_before):
                return wanted
            logger.info("others host, or will host, what nobody hosted")
        except SwarmError as error:
            logger.warning("could not look for experts that nobody hosts: %s", error)
        await claim({})
        return None

    def _goes_before(self, peer_id: str) -> bool:
        return lot(peer_id) < lot(self._peer_id)

    async def _wanted(self, hosted: Experts, *, claims_of: Callable[[str], bool]) -> dict[int, frozenset[int]] | None:
        """See :func:`wanted_repair`. Of those of whom `claims_of` says so, what they are about to host counts, not what
        they host: two who have the same must not both give it up."""
        found = await self._directory.experts(self._model)
        others = [
            ExpertHost(one.peer_id, one.experts_soon if claims_of(one.peer_id) else one.experts, one.rows_per_s or 0.0)
            for one in found
            if one.peer_id != self._peer_id and one.state is not State.DRAINING
        ]
        me = ExpertHost(self._peer_id, hosted)
        return wanted_repair(me, others, self._shape, self._sizes, self._room_bytes)
