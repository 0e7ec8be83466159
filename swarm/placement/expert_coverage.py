"""How many servers host each expert of a model, and what these can do for it. Arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from swarm.placement.coverage import Counts, Flags, Floats
from swarm.placement.expert_demand import NO_DEMAND, ExpertDemand

Experts = Mapping[int, frozenset[int]]
"""Experts by block. Blocks with none of them may be missing."""

UNKNOWN_ROWS_PER_S = 1e-3
"""A server that does not know its speed counts as slow, not as nothing."""


@dataclass(frozen=True)
class ExpertHost:
    """Which experts one server hosts, or is loading, as others see it."""

    peer_id: str
    experts: Experts = field(default_factory=dict)
    capacity: float = 0.0
    """Rows (one token through one expert) per second; 0: unknown."""


class ExpertCoverage:
    """Copies and speed of each expert. Arrays are ``[blocks, experts]``, as wide as the widest block.

    Attributes:
        exists: bool: blocks may have different numbers of experts, and dense ones have none.
        shares: float64: of what the block's tokens choose.
        copies: int64: how many servers host it.
        rows_per_s: float64: what these do for it, if each divides its time evenly among the experts it hosts.
    """

    def __init__(self, model_shape: Sequence[int], demand: ExpertDemand = NO_DEMAND) -> None:
        size = len(model_shape), max(model_shape, default=0)
        self.model_shape = tuple(model_shape)
        self.exists: Flags = np.arange(size[1]) < np.asarray(model_shape, np.int64).reshape(-1, 1)
        self.shares: Floats = np.zeros(size)
        for block, experts in enumerate(model_shape):
            if experts:
                self.shares[block, :experts] = demand.shares(block, experts)
        self.copies: Counts = np.zeros(size, np.int64)
        self.rows_per_s: Floats = np.zeros(size)

    @classmethod
    def of(
        cls, hosts: Iterable[ExpertHost], model_shape: Sequence[int], demand: ExpertDemand = NO_DEMAND
    ) -> ExpertCoverage:
        """Experts that the model does not have are left out."""
        coverage = cls(model_shape, demand)
        for one in sorted(hosts, key=lambda one: one.peer_id):  # sums of floats depend on the order
            coverage.add(one)
        return coverage

    def add(self, host: ExpertHost) -> None:
        """A server comes."""
        hosted = self.flags(host.experts)
        self.copies += hosted
        self.rows_per_s[hosted] += max(host.capacity, UNKNOWN_ROWS_PER_S) / max(int(hosted.sum()), 1)

    def flags(self, experts: Experts) -> Flags:
        """``[blocks, experts]``: which are among these."""
        flags = np.zeros_like(self.exists)
        for block, those in experts.items():
            if 0 <= block < len(self.model_shape):
                flags[block, [one for one in those if 0 <= one < self.model_shape[block]]] = True
        return flags

    def needs(self) -> Floats:
        """``[blocks, experts]``: demand, over what the hosts do for it; demand alone where there is no host."""
        return self.shares / np.where(self.copies > 0, self.rows_per_s, 1.0)


def experts_of(flags: Flags) -> dict[int, frozenset[int]]:
    """By block, those that are flagged; the reverse of :meth:`ExpertCoverage.flags`."""
    flagged = ((block, np.flatnonzero(row)) for block, row in enumerate(flags))
    return {block: frozenset(row.tolist()) for block, row in flagged if len(row)}
