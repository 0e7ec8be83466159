"""Which blocks a server that joins should host."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

from swarm.placement.coverage import Coverage, Quality
from swarm.placement.hosting import Capacity, Hosting, Span

_SLOWEST_SHARE = 0.25
"""A server hosts fewer blocks than fit if with all of them it were slower than this share of the swarm's bottleneck."""
_AS_GOOD = 0.995
"""Spans whose bottleneck reaches this share of the best one's are equally good: latency decides between them."""


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
    qualities = coverage.qualities_with(length, capacity.steps_per_s(length))
    start = nearest_of_the_best(qualities, range(len(qualities)), length, others, rtts_s or {})
    return start, start + length


def blocks_to_host(coverage: Coverage, capacity: Capacity) -> int:
    """How many blocks a server should host: all that fit, unless that makes it a bottleneck of its own.

    A large memory beside a slow processor is worth most when blocks are missing, and does no good as a span that every
    step waits for: as long as all blocks have two servers, it takes so few that it keeps up with the others.
    """
    fit = min(capacity.max_blocks, coverage.num_blocks)
    quality = coverage.quality()
    if quality.single < 0 or capacity.block_steps_per_s <= 0:
        return fit
    bearable = capacity.block_steps_per_s / (_SLOWEST_SHARE * quality.bottleneck)
    return max(min(fit, 1), min(fit, int(bearable)))


def settle(me: Hosting, joining: Iterable[Hosting], others: Iterable[Hosting], num_blocks: int) -> Span:
    """Where `me` goes when several servers join at once, who see one another's announcements.

    Everybody lets all choose, one after another, in the same order: so each knows what those before it take, whatever
    they announced at first.

    Args:
        joining: who has announced that it is loading, with as many blocks as it will host; may include `me`.
        others: who is there already.
    """
    placed = [one for one in others if one.peer_id != me.peer_id]
    queue = {one.peer_id: one for one in joining} | {me.peer_id: me}
    for one in sorted(queue.values(), key=lambda one: hashlib.sha256(one.peer_id.encode()).digest()):
        capacity = Capacity(one.length, one.steps_per_s * one.length)
        start, end = choose_span(placed, num_blocks, capacity, blocks=one.length, rtts_s=one.rtts_s)
        if one.peer_id == me.peer_id:
            return start, end
        placed.append(Hosting(one.peer_id, start, end, one.steps_per_s))
    raise AssertionError("unreachable: `me` is in the queue")


def nearest_of_the_best(
    qualities: Sequence[Quality],
    starts: Iterable[int],
    length: int,
    others: Sequence[Hosting],
    rtts_s: Mapping[str, float],
) -> int:
    """Of `starts`, the one with the best quality; of those about as good, the one with the nearest neighbours."""
    starts = list(starts)
    best = max(qualities[start] for start in starts)
    good = [
        start
        for start in starts
        if qualities[start][:2] == best[:2] and qualities[start].bottleneck >= _AS_GOOD * best.bottleneck
    ]
    if not rtts_s:
        return max(good, key=lambda start: (qualities[start], -start))

    near = [one for one in others if one.peer_id in rtts_s]

    def distance_s(start: int) -> float:
        """To the nearest server before and after, where that is known."""
        end = start + length
        before = [rtts_s[one.peer_id] for one in near if one.start < start <= one.end]
        after = [rtts_s[one.peer_id] for one in near if one.start <= end < one.end]
        known = [min(rtts) for rtts in (before, after) if rtts]
        return sum(known) / len(known) if known else max(rtts_s.values())

    return min(good, key=lambda start: (distance_s(start), tuple(-part for part in qualities[start]), start))
