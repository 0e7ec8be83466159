"""Which servers each block and each expert of a model has, and how many deaths that survives. Pure.

A server of blocks that lacks some routed experts is of use only while every expert that it lacks is hosted by some
server of experts. So a block falls when all servers that have all of its experts themselves are gone, and besides
either all those that lack some, or all hosts of one that is lacking.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from swarm.dht import Announcement, ExpertAnnouncement

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Coverage:
    """Of one model, by the servers that are given."""

    copies: Counts
    """By block: servers that host it, whether or not experts are missing."""
    survives: int | None
    """So many servers, whichever they are, can die at once and every block still has one that can compute it. Where
    servers keep different experts of the same block themselves it may be more. None: some block has none now."""
    uncovered: tuple[int, ...]
    """Blocks without any server."""
    expert_copies: Mapping[int, Counts] = field(default_factory=dict)
    """By block that has routed experts: how many servers of experts host each."""
    missing_experts: Mapping[int, frozenset[int]] = field(default_factory=dict)
    """By block: experts that nobody hosts and that some server of the block lacks."""
    stuck: tuple[int, ...] = ()
    """Blocks all of whose servers lack an expert that nobody hosts."""


def coverage_of(
    num_blocks: int,
    experts: Mapping[int, int],
    spans: Iterable[Announcement],
    hosts: Iterable[ExpertAnnouncement],
) -> Coverage:
    """What these servers cover together.

    Args:
        experts: routed experts by block.
    """
    spans = list(spans)
    copies = _copies(num_blocks, spans)
    expert_copies = _expert_copies(experts, hosts)
    lacking = _lacking(spans, expert_copies)
    least = _least_to_fall(copies, lacking, expert_copies)
    missing: dict[int, frozenset[int]] = {}
    for block, servers in lacking.items():
        nobody = {expert for lacked in servers for expert in lacked if not _hosts_of(expert_copies, block, expert)}
        if nobody:
            missing[block] = frozenset(nobody)
    fewest = int(least.min())
    return Coverage(
        copies,
        fewest - 1 if fewest > 0 else None,
        tuple(np.flatnonzero(copies == 0).tolist()),
        expert_copies,
        missing,
        tuple(np.flatnonzero((least == 0) & (copies > 0)).tolist()),
    )


def throughput_bound(num_blocks: int, spans: Iterable[Announcement]) -> float:
    """Decode steps per second that no placement of these servers can exceed: Σ t·n / L."""
    return sum(one.throughput * (one.end - one.start) for one in spans) / num_blocks


def _copies(num_blocks: int, spans: Sequence[Announcement]) -> Counts:
    changes = np.zeros(num_blocks + 1, np.int64)
    np.add.at(changes, [one.start for one in spans], 1)
    np.add.at(changes, [one.end for one in spans], -1)
    copies: Counts = np.cumsum(changes)[:-1]
    return copies


def _expert_copies(experts: Mapping[int, int], hosts: Iterable[ExpertAnnouncement]) -> dict[int, Counts]:
    copies: dict[int, Counts] = {block: np.zeros(count, np.int64) for block, count in experts.items()}
    for host in hosts:
        for block, bitmap in host.bitmaps.items():
            if (counts := copies.get(block)) is not None:
                bits = np.unpackbits(np.frombuffer(bitmap, np.uint8), bitorder="little")[: len(counts)]
                counts[: len(bits)] += bits
    return copies


def _lacking(spans: Sequence[Announcement], expert_copies: Mapping[int, Counts]) -> dict[int, list[frozenset[int]]]:
    """By block, of each server that lacks any, the experts that it lacks."""
    seen: dict[tuple[int, str], frozenset[int]] = {}
    lacking: dict[int, list[frozenset[int]]] = {}
    for one in spans:
        for block, kept in one.kept_experts.items():
            if not one.hosts(block) or block not in expert_copies:
                continue
            if (block, kept) not in seen:
                count = len(expert_copies[block])
                bits = np.zeros(count, np.uint8)
                have = np.unpackbits(np.frombuffer(bytes.fromhex(kept), np.uint8), bitorder="little")[:count]
                bits[: len(have)] = have
                seen[block, kept] = frozenset(np.flatnonzero(bits == 0).tolist())
            if seen[block, kept]:
                lacking.setdefault(block, []).append(seen[block, kept])
    return lacking


def _least_to_fall(
    copies: Counts, lacking: Mapping[int, list[frozenset[int]]], expert_copies: Mapping[int, Counts]
) -> Counts:
    """By block, no fewer servers must die before none can compute it."""
    least = copies.copy()
    for block, servers in lacking.items():
        hosted = expert_copies[block]
        usable = [lacked for lacked in servers if all(hosted[expert] for expert in lacked)]
        fewest = min((int(hosted[expert]) for lacked in set(usable) for expert in lacked), default=0)
        least[block] += min(len(usable), fewest) - len(servers)
    return least


def _hosts_of(expert_copies: Mapping[int, Counts], block: int, expert: int) -> int:
    return int(expert_copies[block][expert])
