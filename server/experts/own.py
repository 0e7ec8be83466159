"""Which routed experts a server of blocks holds itself."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import nn

from swarm.dht import Directory
from swarm.errors import SwarmError
from swarm.models.experts import RoutedTables, routed_experts
from swarm.placement import local_experts
from swarm.placement.expert_demand import ExpertDemand
from swarm.server.preparation import Prepared

logger = logging.getLogger(__name__)


class OwnExperts:
    """As its owner asked for, or else as many as fit: whole blocks, then those that are asked for most."""

    def __init__(self, prepared: Prepared, directory: Directory) -> None:
        self._prepared, self._directory = prepared, directory

    async def choose(self, bounds: tuple[int, int], reuse: Mapping[int, nn.Module]) -> RoutedTables:
        """Of the blocks of a span that are not to have all of their experts here: those that are.

        Args:
            reuse: layers that are in memory already, and stay as they are.
        """
        prepared = self._prepared
        routed = {block: those for block, those in prepared.routed.items() if bounds[0] <= block < bounds[1]}
        if not prepared.experts_as_fit:
            return routed
        try:
            told = [one.tokens_lately for one in await self._directory.experts(prepared.checkpoint.model_digest)]
        except SwarmError as error:
            logger.warning("which experts are asked for most could not be seen: %s", error)
            told = []
        counts = {block: table.count for block, (table, _) in routed.items()}
        sizes = {block: prepared.expert_bytes(block) for block in routed}
        kept = {block: _kept(layer, counts[block]) for block, layer in reuse.items() if block in routed}
        kept |= local_experts(
            {block: count for block, count in counts.items() if block not in kept},
            sizes,
            prepared.plan.expert_bytes - sum(sizes[block] * len(those) for block, those in kept.items()),
            ExpertDemand.told(told, counts),
        )
        chosen = {block: (table, kept.get(block, frozenset())) for block, (table, _) in routed.items()}
        return {block: (table, those) for block, (table, those) in chosen.items() if len(those) < table.count}


def _kept(layer: nn.Module, count: int) -> frozenset[int]:
    ours = routed_experts([layer])
    return frozenset(ours[0].kept) if ours else frozenset(range(count))
