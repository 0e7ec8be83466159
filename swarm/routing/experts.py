"""Which servers compute the experts that a layer's tokens chose: few servers, then those that answer soonest."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class ExpertChoice:
    """A server that could be asked, as the server that runs the layer sees it."""

    peer_id: str
    experts: frozenset[int]
    """Of this block, that it hosts."""
    cost_s: float = 0.0
    """Seconds until its answer to one message is expected: the way there and back, its queue, its computing."""


class Assignment(NamedTuple):
    """Who computes what. Every needed expert is in exactly one of all these sets."""

    by_peer: dict[str, frozenset[int]]
    """Experts by peer id; who has nothing to do is not in it."""
    uncovered: frozenset[int]
    """Nobody hosts them. The caller must wait or raise: to go on without them would give other tokens."""


def assign_experts(needed: Collection[int], hosts: Sequence[ExpertChoice], *, patience: float = math.inf) -> Assignment:
    """Everything that somebody hosts, on few servers; of as many, on those that answer soonest.

    Greedy: the server that hosts most of what is left is asked next. So at most ``1 + ln(len(needed))`` times as many
    are asked as would do; for simulated tokens 0.5% more if experts are placed by :mod:`swarm.placement`, 2% if anyhow.
    What several of them host, the one that answers soonest computes. The order of `hosts` does not matter.

    Args:
        needed: experts of one block, chosen by one token or by any of a batch.
        hosts: with different peer ids.
        patience: servers are left out that take more than so many times what having everything takes at least, which is
            when the last expert's soonest server answers. The layer waits for its slowest answer: without this, a slow
            server that hosts much is asked by everybody. 1: as soon as possible, with however many messages.
    """
    useful = {one.peer_id: one.experts.intersection(needed) for one in _bearable(needed, hosts, patience)}
    cost_s = {one.peer_id: one.cost_s for one in hosts}
    soonest_first = sorted((peer_id for peer_id in useful if useful[peer_id]), key=lambda one: (cost_s[one], one))
    left, asked = frozenset(needed), list[str]()
    while left and soonest_first:
        best = max(soonest_first, key=lambda one: len(useful[one] & left))  # of equals the first
        if not useful[best] & left:
            break
        asked.append(best)
        left -= useful[best]
    return Assignment(_divided({one: useful[one] for one in soonest_first if one in asked}), left)


def _bearable(needed: Collection[int], hosts: Sequence[ExpertChoice], patience: float) -> Sequence[ExpertChoice]:
    """Those that are not too slow; for each needed expert at least one."""
    if patience == math.inf:
        return hosts
    soonest_s = (min((one.cost_s for one in hosts if expert in one.experts), default=0.0) for expert in needed)
    limit_s = max(patience, 1.0) * max(soonest_s, default=0.0)
    return [one for one in hosts if one.cost_s <= limit_s]


def _divided(useful: dict[str, frozenset[int]]) -> dict[str, frozenset[int]]:
    """Each expert to one of its hosts, the first; without hosts that turn out not to be needed, the last first."""
    for peer_id in reversed(list(useful)):
        if useful[peer_id] <= frozenset[int]().union(*(useful[other] for other in useful if other != peer_id)):
            del useful[peer_id]
    taken: frozenset[int] = frozenset()
    by_peer = {}
    for peer_id, experts in useful.items():
        by_peer[peer_id] = experts - taken
        taken |= experts
    return by_peer
