"""How often experts are chosen, and which together: counted from what routers chose."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from swarm.placement.coverage import Floats

Activations = Mapping[int, NDArray[np.int64]]
"""What routers chose, by block: ``[tokens, k]``, the experts of each token, none twice."""


@dataclass(frozen=True)
class ExpertDemand:
    """Counts. Blocks may be missing, and be counted over different tokens: only proportions within a block matter.

    There are none for experts of neighbouring blocks: each layer sends messages of its own, so experts that follow one
    another save none by being on one server.
    """

    chosen: Mapping[int, Floats] = field(default_factory=dict)
    """By block ``[experts]``: by how many tokens each was chosen."""
    together: Mapping[int, Floats] = field(default_factory=dict)
    """By block ``[experts, experts]``, symmetric, 0 on the diagonal: by how many tokens both were chosen."""

    @classmethod
    def of(cls, activations: Activations, experts: Mapping[int, int]) -> ExpertDemand:
        """Count.

        Args:
            experts: how many each of these blocks has.
        """
        chosen: dict[int, Floats] = {}
        together: dict[int, Floats] = {}
        for block, choices in activations.items():
            hits = np.zeros((len(choices), experts[block]), np.float32)
            np.put_along_axis(hits, choices, 1.0, axis=1)
            pairs = (hits.T @ hits).astype(np.float64)
            chosen[block] = pairs.diagonal().copy()
            np.fill_diagonal(pairs, 0.0)
            together[block] = pairs
        return cls(chosen, together)

    @classmethod
    def told(cls, told: Iterable[Mapping[int, Mapping[int, float]]], experts: Mapping[int, int]) -> ExpertDemand:
        """What servers of experts tell, added up: replicas of an expert share what is asked of it.

        Args:
            told: of each server, by block and expert: for how many tokens it was asked for. What the model does not
                have is left out.
            experts: how many each block has.
        """
        chosen: dict[int, Floats] = {}
        for one in told:
            for block, tokens in one.items():
                if count := experts.get(block, 0):
                    counts = chosen.setdefault(block, np.zeros(count))
                    for expert in tokens.keys() & range(count):
                        counts[expert] += tokens[expert]
        return cls(chosen)

    def shares(self, block: int, experts: int) -> Floats:
        """``[experts]``: of all that was chosen in this block; equal shares if nothing is known of it."""
        counts = self.chosen.get(block)
        if counts is None or counts.shape != (experts,) or not counts.sum() > 0:
            return np.full(experts, 1.0 / experts)
        return np.asarray(counts / counts.sum(), np.float64)

    def pairs(self, block: int, experts: int) -> Floats | None:
        """``[experts, experts]``: `together`, or None if nothing is known of this block."""
        pairs = self.together.get(block)
        return pairs if pairs is not None and pairs.shape == (experts, experts) and pairs.any() else None


NO_DEMAND = ExpertDemand()
"""Nothing is known: all experts count as equally hot."""
