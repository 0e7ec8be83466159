"""Which experts a server should host that hosts experts without their blocks' attention."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from swarm.placement.coverage import Counts, Flags, Floats
from swarm.placement.expert_coverage import ExpertCoverage, ExpertHost, experts_of
from swarm.placement.expert_demand import NO_DEMAND, ExpertDemand
from swarm.placement.expert_groups import group

_DIGITS = 9
"""Shares and needs that differ beyond these are equal: sums of floats differ in the last bits."""


@dataclass(frozen=True)
class ExpertJoiner:
    """A server that will host experts, as it announces itself while it does not know which."""

    peer_id: str
    memory_bytes: int
    """For the weights of experts."""
    capacity: float = 0.0
    """Rows (one token through one expert) per second; 0: unknown."""


def choose_experts(
    hosts: Iterable[ExpertHost],
    model_shape: Sequence[int],
    expert_bytes: Sequence[int],
    memory_bytes: int,
    demand: ExpertDemand = NO_DEMAND,
    *,
    peer_id: str = "",
) -> dict[int, frozenset[int]]:
    """The experts that most need one more host, as many as fit, by block.

    In this order: experts without a host get one; those with one get a second; where demand is highest, over what the
    hosts there do, it is met by another. All the same, whole blocks are taken wherever possible: a token chooses its
    experts in one block, and if these are on one server one message reaches them all. Of a block of which only a part
    fits, those are taken that are chosen together (:mod:`swarm.placement.expert_groups`).

    Args:
        hosts: who is there, or joining. The newcomer itself counts for nothing.
        model_shape: how many experts each block has; 0: the block is dense.
        expert_bytes: of one expert of each block.
        demand: of any blocks; of others, all experts count as equally hot.
        peer_id: the newcomer's. Among equals it decides, so that two who do not know of one another seldom choose the
            same; who knows the same hosts computes the same for the same peer id.

    Raises:
        ValueError: `model_shape` and `expert_bytes` are not of the same model, or an expert takes no memory.
    """
    coverage = ExpertCoverage.of((one for one in hosts if one.peer_id != peer_id), model_shape, demand)
    return choose_over(coverage, expert_bytes, memory_bytes, demand, peer_id=peer_id)


def choose_over(
    coverage: ExpertCoverage,
    expert_bytes: Sequence[int],
    memory_bytes: int,
    demand: ExpertDemand = NO_DEMAND,
    *,
    peer_id: str = "",
) -> dict[int, frozenset[int]]:
    """Likewise; `coverage` is that of all others, and was made with the same `demand`."""
    if len(expert_bytes) != len(coverage.model_shape):
        raise ValueError(f"{len(expert_bytes)} sizes of experts for {len(coverage.model_shape)} blocks")
    if any(experts and size < 1 for experts, size in zip(coverage.model_shape, expert_bytes, strict=True)):
        raise ValueError("an expert must have a size of at least one byte")
    choice = _Choice(coverage, expert_bytes, memory_bytes, demand, peer_id)
    choice.take(coverage.copies == 0)
    choice.take(coverage.copies == 1)
    choice.take(coverage.copies >= 2, neediest_first=True)
    return experts_of(choice.mine)


def share_experts(
    joiners: Iterable[ExpertJoiner],
    hosts: Iterable[ExpertHost],
    model_shape: Sequence[int],
    expert_bytes: Sequence[int],
    demand: ExpertDemand = NO_DEMAND,
) -> dict[str, dict[int, frozenset[int]]]:
    """What each of several hosts that join at once, who see one another's announcements; by peer id.

    Everybody computes this for all, and takes its own: they choose one after another, in an order that is the same for
    everybody. So they need the same `demand`; whose counts differ had better leave them out.

    Args:
        hosts: who is there already; joiners count for nothing, whatever they announced at first.
    """
    joining = {one.peer_id: one for one in joiners}
    coverage = ExpertCoverage.of((one for one in hosts if one.peer_id not in joining), model_shape, demand)
    shared: dict[str, dict[int, frozenset[int]]] = {}
    for one in sorted(joining.values(), key=lambda one: lot(one.peer_id)):
        shared[one.peer_id] = choose_over(coverage, expert_bytes, one.memory_bytes, demand, peer_id=one.peer_id)
        coverage.add(ExpertHost(one.peer_id, shared[one.peer_id], one.capacity))
    return shared


def wanted_repair(
    me: ExpertHost,
    others: Iterable[ExpertHost],
    model_shape: Sequence[int],
    expert_bytes: Sequence[int],
    memory_bytes: int,
    demand: ExpertDemand = NO_DEMAND,
) -> dict[int, frozenset[int]] | None:
    """What a server should host from now on, because some experts have no server at all; None: there is no need, or it
    has no room that others could spare.

    It keeps what nobody else hosts, takes of what nobody hosts as many as fit, and keeps of the rest what still fits.
    """
    coverage = ExpertCoverage.of(others, model_shape, demand)
    mine = coverage.flags(me.experts)
    choice = _Choice(coverage, expert_bytes, memory_bytes, demand, me.peer_id)
    for wanted in (mine & (coverage.copies == 0), ~mine & (coverage.copies == 0)):
        choice.take(wanted)
    repaired = bool((choice.mine & ~mine).any())
    choice.take(mine & ~choice.mine)
    return experts_of(choice.mine) if repaired else None


def local_experts(
    model_shape: Mapping[int, int],
    expert_bytes: Mapping[int, int],
    memory_bytes: int,
    demand: ExpertDemand = NO_DEMAND,
) -> dict[int, frozenset[int]]:
    """Which experts a server that runs the attention of some blocks should hold itself, by block.

    As many whole blocks as fit, and with what is left the hottest. A token sends no message only if all its experts are
    here: with half of the memory that all would take, whole blocks save half of the messages, but the hottest half of
    256 experts, of which each token chooses 8, saves a seventh.

    Args:
        model_shape: how many experts each of the server's blocks has.
        expert_bytes: of one expert of each of these.
    """
    blocks = sorted((block for block in model_shape if model_shape[block]), key=lambda one: (expert_bytes[one], one))
    mine: dict[int, frozenset[int]] = {}
    for block in blocks:
        size_bytes = model_shape[block] * expert_bytes[block]
        if size_bytes <= memory_bytes:
            mine[block] = frozenset(range(model_shape[block]))
            memory_bytes -= size_bytes
    shares = {block: demand.shares(block, model_shape[block]) for block in blocks if block not in mine}
    by_heat = sorted((-float(share), block, one) for block in shares for one, share in enumerate(shares[block]))
    for _, block, one in by_heat:
        if expert_bytes[block] <= memory_bytes:
            mine[block] = mine.get(block, frozenset()) | {one}
            memory_bytes -= expert_bytes[block]
    return mine


class _Choice:
    """What one server has chosen so far."""

    def __init__(
        self,
        coverage: ExpertCoverage,
        expert_bytes: Sequence[int],
        memory_bytes: int,
        demand: ExpertDemand,
        peer_id: str,
    ) -> None:
        self.mine: Flags = np.zeros_like(coverage.exists)
        self._coverage, self._demand, self._free_bytes = coverage, demand, memory_bytes
        self._expert_bytes: Counts = np.maximum(np.asarray(expert_bytes, np.int64), 1)
        self._experts: Counts = np.maximum(coverage.exists.sum(1), 1)
        self._needs = coverage.needs()
        blocks = max(len(coverage.model_shape), 1)
        self._turn = (np.arange(len(coverage.model_shape)) - int.from_bytes(lot(peer_id)) % blocks) % blocks

    def take(self, wanted: Flags, *, neediest_first: bool = False) -> None:
        """Of these, as many as fit, block by block."""
        wanted = wanted & self._coverage.exists
        most_needed = np.cumsum(-np.sort(-np.where(wanted, self._needs, 0.0), axis=1), axis=1)
        while True:
            offered = wanted.sum(1)
            fit = np.minimum(offered, max(self._free_bytes, 0) // self._expert_bytes)
            if not fit.any():
                return
            need = most_needed[np.arange(len(fit)), fit - 1] / np.maximum(fit, 1)
            block = self._next_block(offered, fit, need, neediest_first)
            among, own = np.flatnonzero(wanted[block]), np.flatnonzero(self.mine[block])
            pairs = self._demand.pairs(block, self._coverage.model_shape[block])
            self.mine[block, group(int(fit[block]), among, own, self._needs[block], pairs)] = True
            self._free_bytes -= int(fit[block] * self._expert_bytes[block])
            wanted[block] = False  # all of it is taken, or no more of it fits

    def _next_block(self, offered: Counts, fit: Counts, need: Floats, neediest_first: bool) -> int:
        """Where this server comes closest to hosting the whole block; then, where it leaves others the smallest rest.

        Of equals the one with the greatest need, then one beside what it has taken, so that a server that runs many
        blocks has to do with few others.
        """
        whole = -((self.mine.sum(1) + fit) / self._experts).round(_DIGITS)
        rest, needy = offered - fit, -(need / max(need.max(), 1e-300)).round(_DIGITS)
        taken = np.flatnonzero(self.mine.any(1))
        beside = np.isin(np.arange(len(fit)), [taken - 1, taken + 1])
        keys = [needy, whole, rest] if neediest_first else [whole, rest, needy]
        return int(np.lexsort([self._turn, ~beside, *reversed(keys), fit == 0])[0])


def lot(peer_id: str) -> bytes:
    """Its place in an order that is the same for everybody, and that nobody has chosen."""
    return hashlib.sha256(peer_id.encode()).digest()
