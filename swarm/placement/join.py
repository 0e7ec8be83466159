"""Which blocks a server that joins should host."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from swarm.placement.coverage import Coverage, Flags, Qualities
from swarm.placement.hosting import Capacity, Hosting, Span

_NOTHING_KNOWN: Mapping[str, float] = MappingProxyType({})
_SLOWEST_SHARE = 0.25
"""A server hosts fewer blocks than fit if with all of them it were slower than this share of what others do."""


def choose_span(
    others: Iterable[Hosting],
    num_blocks: int,
    capacity: Capacity,
    *,
    blocks: int | None = None,
    rtts_s: Mapping[str, float] | None = None,
) -> Span:
    """The consecutive blocks that most need one more server with such a capacity.

    In this order: blocks without a server get one; blocks with one get a second; the slowest blocks become as fast as
    possible; neighbouring blocks are on near peers. Of equals the earliest wins, so that the choice is the same for
    everybody who knows the same.

    Args:
        others: who is there, or joining.
        blocks: host exactly so many (or the whole model); default: as many as memory and speed suggest.
        rtts_s: seconds of a round trip to others, by peer id, as far as known.

    Raises:
        ValueError: the server could host nothing.
    """
    others = sorted(others, key=lambda one: one.peer_id)  # sums of floats depend on the order
    coverage = Coverage.of(others, num_blocks)
    length = blocks_to_host(coverage, capacity) if blocks is None else min(blocks, num_blocks)
    if length < 1:
        raise ValueError("a server must host at least one block")
    start = best_start(coverage, length, capacity.steps_per_s(length), others, rtts_s or {})
    return start, start + length


def best_start(
    coverage: Coverage,
    length: int,
    steps_per_s: float,
    others: Iterable[Hosting] = (),
    rtts_s: Mapping[str, float] = _NOTHING_KNOWN,
    allowed: Flags | None = None,
) -> int:
    """Where a span of so many blocks makes the placement best; among those about as good, next to near peers.

    Args:
        others: whose coverage it is; needed only for `rtts_s`.
        allowed: ``[starts]``: where the span may begin; default: anywhere.
    """
    return best_of(coverage.qualities_with(length, steps_per_s), length, others, rtts_s, allowed)


def best_of(
    qualities: Qualities,
    length: int,
    others: Iterable[Hosting] = (),
    rtts_s: Mapping[str, float] = _NOTHING_KNOWN,
    allowed: Flags | None = None,
) -> int:
    """Likewise, of placements that are known already."""
    if allowed is None:
        allowed = np.ones(len(qualities.bottleneck), dtype=bool)
    return _nearest(qualities.best(allowed), length, others, rtts_s)


def blocks_to_host(coverage: Coverage, capacity: Capacity) -> int:
    """How many blocks a server should host: as many as fit, less what keeps spans from tiling the model.

    A server for 23 of 80 blocks takes 20: four such make a whole, they are the faster for it, and routes change servers
    where spans end. And a large memory beside a slow processor is worth most when blocks are missing, but a session
    that passes through it waits at every block: once all blocks have two servers, it takes so few that it is not far
    slower than others.
    """
    fit = min(capacity.max_blocks, coverage.num_blocks)
    if (coverage.servers >= 2).all() and capacity.block_steps_per_s > 0:
        bearable = capacity.block_steps_per_s / (_SLOWEST_SHARE * coverage.usual_steps_per_s())
        fit = min(fit, max(1, int(bearable)))
    return -(-coverage.num_blocks // -(-coverage.num_blocks // fit)) if fit > 0 else 0


def settle(me: Hosting, joining: Iterable[Hosting], others: Iterable[Hosting], num_blocks: int) -> Span:
    """Where `me` goes when several servers join at once, who see one another's announcements.

    Everybody lets all choose, one after another, in the same order: so each knows what those before it take, whatever
    they announced at first.

    Args:
        joining: who has announced that it is loading, with as many blocks as it will host; may include `me`.
        others: who is there already.
    """
    there = sorted((one for one in others if one.peer_id != me.peer_id), key=lambda one: one.peer_id)
    return settle_over(me, joining, Coverage.of(there, num_blocks), there)


def settle_over(me: Hosting, joining: Iterable[Hosting], coverage: Coverage, others: Sequence[Hosting] = ()) -> Span:
    """Likewise; `coverage` is that of `others`."""
    coverage, placed = coverage.copy(), list(others)
    for one in sorted((one for one in joining if _turn(one) < _turn(me)), key=_turn):
        start = best_start(coverage, one.length, one.steps_per_s, placed, one.rtts_s)
        coverage.add((start, start + one.length), one.steps_per_s)
        placed.append(Hosting(one.peer_id, start, start + one.length, one.steps_per_s))
    start = best_start(coverage, me.length, me.steps_per_s, placed, me.rtts_s)
    return start, start + me.length


def _turn(joining: Hosting) -> bytes:
    return hashlib.sha256(joining.peer_id.encode()).digest()


def _nearest(starts: Sequence[int], length: int, others: Iterable[Hosting], rtts_s: Mapping[str, float]) -> int:
    """Of `starts`, the one with the nearest neighbours, as far as that is known; else the first."""
    if not rtts_s:
        return starts[0]
    near = [one for one in others if one.peer_id in rtts_s]

    def distance_s(start: int) -> float:
        """To the nearest server before and after, where that is known."""
        end = start + length
        before = [rtts_s[one.peer_id] for one in near if one.start < start <= one.end]
        after = [rtts_s[one.peer_id] for one in near if one.start <= end < one.end]
        known = [min(rtts) for rtts in (before, after) if rtts]
        return sum(known) / len(known) if known else max(rtts_s.values())

    return min(starts, key=distance_s)
