"""Which blocks a server that joins should host."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from swarm.placement.coverage import Coverage, Flags, Qualities
from swarm.placement.hosting import Capacity, Hosting, Span
from swarm.placement.tiles import tile_lengths, tile_starts

_NOTHING_KNOWN: Mapping[str, float] = MappingProxyType({})
_LEAST_RTT_S = 0.005
"""Shorter round trips are not told apart: how busy machines are makes more difference."""
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
        blocks: host exactly so many (or the whole model); default: as many as memory and speed suggest, and a tile
            (:mod:`swarm.placement.tiles`) where that costs no block its first or second server.
        rtts_s: seconds of a round trip to others, by peer id, as far as known.

    Raises:
        ValueError: the server could host nothing.
    """
    others = sorted(others, key=lambda one: one.peer_id)  # sums of floats depend on the order
    coverage = Coverage.of(others, num_blocks)
    length = blocks_to_host(coverage, capacity) if blocks is None else min(blocks, num_blocks)
    if length < 1:
        raise ValueError("a server must host at least one block")
    preferred = tile_starts(length, num_blocks) if blocks is None else None
    start = best_start(coverage, length, capacity.steps_per_s(length), others, rtts_s or {}, preferred=preferred)
    return start, start + length


def best_start(
    coverage: Coverage,
    length: int,
    steps_per_s: float,
    others: Iterable[Hosting] = (),
    rtts_s: Mapping[str, float] = _NOTHING_KNOWN,
    allowed: Flags | None = None,
    preferred: Flags | None = None,
) -> int:
    """Where a span of so many blocks makes the placement best; among those about as good, next to near peers.

    Args:
        others: whose coverage it is; needed only for `rtts_s`.
        allowed: ``[starts]``: where the span may begin; default: anywhere.
        preferred: ``[starts]``: where it shall begin, unless elsewhere more blocks get their first or second server.
    """
    return best_of(coverage.qualities_with(length, steps_per_s), length, others, rtts_s, allowed, preferred)


def best_of(
    qualities: Qualities,
    length: int,
    others: Iterable[Hosting] = (),
    rtts_s: Mapping[str, float] = _NOTHING_KNOWN,
    allowed: Flags | None = None,
    preferred: Flags | None = None,
) -> int:
    """Likewise, of placements that are known already."""
    if preferred is not None:
        narrowed = preferred if allowed is None else allowed & preferred
        if narrowed.any() and (
            qualities.all_cover_as_much or qualities.covers_as_much(qualities.best(narrowed), qualities.best(allowed))
        ):
            allowed = narrowed
    return _nearest(qualities.good(allowed), length, others, rtts_s) if rtts_s else qualities.best(allowed)


def blocks_to_host(coverage: Coverage, capacity: Capacity) -> int:
    """How many blocks a server should host.

    While blocks lack a server, or a second one: as many as fit, less what keeps spans from tiling the model. A server
    for 23 of 80 blocks takes 20: four such make a whole, they are the faster for it, and routes change servers where
    spans end. Then: the longest tile that fits. And a large memory beside a slow processor is worth most when blocks
    are missing, but a session that passes through it waits at every block: once all have two servers, it takes so few
    that it is not far slower than others.
    """
    fit, num_blocks = min(capacity.max_blocks, coverage.num_blocks), coverage.num_blocks
    if fit < 1:
        return 0
    if coverage.servers.min() < 2:
        return -(-num_blocks // -(-num_blocks // fit))
    if capacity.block_steps_per_s > 0:
        bearable = capacity.block_steps_per_s / (_SLOWEST_SHARE * coverage.usual_steps_per_s())
        fit = min(fit, max(1, int(bearable)))
    return next(length for length in tile_lengths(num_blocks) if length <= fit)


def settle(
    me: Hosting, joining: Iterable[Hosting], others: Iterable[Hosting], num_blocks: int, *, tiles: bool = False
) -> Span:
    """Where `me` goes when several servers join at once, who see one another's announcements.

    Everybody lets all choose, one after another, in the same order: so each knows what those before it take, whatever
    they announced at first.

    Args:
        joining: who has announced that it is loading, with as many blocks as it will host; may include `me`.
        others: who is there already.
        tiles: they chose how many blocks they host by themselves, as :func:`choose_span` does without `blocks`, and
            prefer tiles.
    """
    there = sorted((one for one in others if one.peer_id != me.peer_id), key=lambda one: one.peer_id)
    return settle_over(me, joining, Coverage.of(there, num_blocks), there, tiles=tiles)


def settle_over(
    me: Hosting, joining: Iterable[Hosting], coverage: Coverage, others: Sequence[Hosting] = (), *, tiles: bool = False
) -> Span:
    """Likewise; `coverage` is that of `others`."""
    coverage, placed = coverage.copy(), list(others)
    before = sorted((one for one in joining if _turn(one) < _turn(me)), key=_turn)
    for one in [*before, me]:
        preferred = tile_starts(one.length, coverage.num_blocks) if tiles else None
        start = best_start(coverage, one.length, one.steps_per_s, placed, one.rtts_s, preferred=preferred)
        coverage.add((start, start + one.length), one.steps_per_s)
        placed.append(Hosting(one.peer_id, start, start + one.length, one.steps_per_s))
    return placed[-1].span


def _turn(joining: Hosting) -> bytes:
    return hashlib.sha256(joining.peer_id.encode()).digest()


def _nearest(starts: Sequence[int], length: int, others: Iterable[Hosting], rtts_s: Mapping[str, float]) -> int:
    """Of `starts` the one with the nearest neighbours, as far as that is known; of equals the first."""
    near = [one for one in others if one.peer_id in rtts_s]
    rtts_s = {peer_id: max(rtt_s, _LEAST_RTT_S) for peer_id, rtt_s in rtts_s.items()}

    def distance_s(start: int) -> float:
        """To the nearest server before and after, where that is known."""
        end = start + length
        before = [rtts_s[one.peer_id] for one in near if one.start < start <= one.end]
        after = [rtts_s[one.peer_id] for one in near if one.start <= end < one.end]
        known = [min(rtts) for rtts in (before, after) if rtts]
        return sum(known) / len(known) if known else max(rtts_s.values())

    return min(starts, key=distance_s)
