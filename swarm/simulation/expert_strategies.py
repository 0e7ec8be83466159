"""How servers choose experts: our placement, and other ways, to compare it with."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from swarm.placement import ExpertCoverage, ExpertDemand, ExpertJoiner
from swarm.placement.expert_coverage import Experts, experts_of
from swarm.placement.experts import choose_over
from swarm.simulation.expert_world import ExpertModel


class ExpertStrategy(Protocol):
    """What a newcomer hosts; `coverage` is that of all others, as they are seen."""

    def __call__(
        self,
        me: ExpertJoiner,
        coverage: ExpertCoverage,
        model: ExpertModel,
        demand: ExpertDemand,
        random: np.random.Generator,
    ) -> Experts: ...


def ours(
    me: ExpertJoiner, coverage: ExpertCoverage, model: ExpertModel, demand: ExpertDemand, random: np.random.Generator
) -> Experts:
    """:mod:`swarm.placement`."""
    sizes = [model.expert_bytes] * len(model.shape)
    return choose_over(coverage, sizes, me.memory_bytes, demand, peer_id=me.peer_id)


def ours_without_affinity(
    me: ExpertJoiner, coverage: ExpertCoverage, model: ExpertModel, demand: ExpertDemand, random: np.random.Generator
) -> Experts:
    """Likewise, if only popularity is known."""
    return ours(me, coverage, model, ExpertDemand(demand.chosen), random)


def by_popularity(
    me: ExpertJoiner, coverage: ExpertCoverage, model: ExpertModel, demand: ExpertDemand, random: np.random.Generator
) -> Experts:
    """The most needed experts, whichever block they are in; first those without a host, then those with one."""
    return _in_order(np.lexsort([-coverage.needs()[coverage.exists], _first_to_cover(coverage)]), me, coverage, model)


def at_random(
    me: ExpertJoiner, coverage: ExpertCoverage, model: ExpertModel, demand: ExpertDemand, random: np.random.Generator
) -> Experts:
    """Any; first those without a host, then those with one."""
    covering = _first_to_cover(coverage)
    return _in_order(np.lexsort([random.random(len(covering)), covering]), me, coverage, model)


def anywhere(
    me: ExpertJoiner, coverage: ExpertCoverage, model: ExpertModel, demand: ExpertDemand, random: np.random.Generator
) -> Experts:
    """Any."""
    return _in_order(random.permutation(int(coverage.exists.sum())), me, coverage, model)


EXPERT_STRATEGIES: dict[str, ExpertStrategy] = {
    "ours": ours,
    "ours, affinity unknown": ours_without_affinity,
    "by popularity": by_popularity,
    "random": at_random,
    "random, coverage unknown": anywhere,
}
"""By name, ours first."""


def _first_to_cover(coverage: ExpertCoverage) -> NDArray[np.int64]:
    return np.minimum(coverage.copies[coverage.exists], 2)


def _in_order(order: NDArray[np.intp], me: ExpertJoiner, coverage: ExpertCoverage, model: ExpertModel) -> Experts:
    """The first that fit, of all that exist."""
    mine = np.zeros(len(order), bool)
    mine[order[: me.memory_bytes // model.expert_bytes]] = True
    flags = np.zeros_like(coverage.exists)
    flags[coverage.exists] = mine
    return experts_of(flags)
