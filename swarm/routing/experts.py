"""Decide which server of experts computes which of the experts that some tokens need. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertChoice:
    """A server that could compute experts of the block in question."""

    peer_id: str
    experts: frozenset[int]
    cost_s: float = 0.0
    """How long it is expected to take to answer."""


def assign_experts(needed: Collection[int], hosts: Sequence[ExpertChoice]) -> dict[str, frozenset[int]]:
    """By peer id, what to ask of whom: few servers (greedy set cover), and of those that serve as well the fastest.

    Experts that nobody hosts are left out.
    """
    missing = set(needed)
    assigned: dict[str, frozenset[int]] = {}
    while missing:
        best = min(
            (host for host in hosts if host.peer_id not in assigned and host.experts & missing),
            key=lambda host: (-len(host.experts & missing), host.cost_s, host.peer_id),
            default=None,
        )
        if best is None:
            break
        assigned[best.peer_id] = frozenset(best.experts & missing)
        missing -= best.experts
    return assigned
