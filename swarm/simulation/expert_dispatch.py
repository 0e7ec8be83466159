"""What it takes to compute the experts of tokens, one after another: how many messages, and who does the work."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from swarm.placement import ExpertHost
from swarm.placement.expert_coverage import UNKNOWN_ROWS_PER_S
from swarm.placement.expert_demand import Activations
from swarm.routing import ExpertChoice, assign_experts


@dataclass(frozen=True)
class Dispatched:
    """Of some tokens."""

    messages: float
    """For each token and block, on average. Experts that nobody hosts are left out."""
    busiest: float
    """The load of the busiest server over that of all together: rows, over rows per second."""


def dispatches_per_token(hosts: Collection[ExpertHost], activations: Activations) -> float:
    """Messages for each token and block, on average, if nothing matters but that they are few."""
    return dispatch(hosts, activations).messages


def dispatch(hosts: Collection[ExpertHost], activations: Activations, *, patience: float = math.inf) -> Dispatched:
    """Ask servers for everything, as layer servers do (:func:`swarm.routing.assign_experts`).

    Tokens come faster than they are computed: a server answers when it has done all that it was asked before, and as
    many rows as a token has in a block.

    Args:
        activations: as many tokens in each block.
        patience: of layer servers; infinite: they wait for the busiest server if that saves them a message.
    """
    rows_per_s = {one.peer_id: max(one.capacity, UNKNOWN_ROWS_PER_S) for one in hosts}
    queue_s = dict.fromkeys(rows_per_s, 0.0)
    hosted = {
        block: [(one.peer_id, one.experts[block]) for one in hosts if block in one.experts] for block in activations
    }
    messages = rows = layers = 0
    for token in range(max((len(choices) for choices in activations.values()), default=0)):
        for block, choices in activations.items():
            offers = [
                ExpertChoice(peer_id, experts, queue_s[peer_id] + choices.shape[1] / rows_per_s[peer_id])
                for peer_id, experts in hosted[block]
            ]
            by_peer = assign_experts(choices[token].tolist(), offers, patience=patience).by_peer
            for peer_id, experts in by_peer.items():
                queue_s[peer_id] += len(experts) / rows_per_s[peer_id]
                rows += len(experts)
            messages += len(by_peer)
            layers += 1
    busiest = max(queue_s.values()) * sum(rows_per_s.values()) / rows if rows else 0.0
    return Dispatched(messages / layers if layers else 0.0, busiest)
