"""Which part of the blocks that a server has loaded it should host: a focus can change in a moment, without a move.

A server computes a part of its blocks as often as all of them in the same time, in proportion: who has 20 blocks and
hosts the 10 that are needed most serves them twice as fast. So a swarm becomes even without anything being loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from swarm.placement.coverage import Coverage, Quality
from swarm.placement.hosting import Hosting, Loaded, Span
from swarm.placement.tiles import tile_lengths


@dataclass(frozen=True)
class FocusPolicy:
    """What a change of focus must bring."""

    narrowest: float = 0.5
    """A server hosts at least this share of what it has loaded: routes through short spans change servers often."""
    least_gain: float = 0.01
    """To be worth it for speed only, it must raise the bottleneck by this share."""
    as_good: float = 0.995
    """Of parts whose bottleneck reaches this share of the best one's, the longest is taken."""


@dataclass(frozen=True)
class Focus:
    """A part of what a server has loaded."""

    span: Span
    steps_per_s: float
    """Through it, of this server."""
    quality: Quality
    """Of the swarm then."""

    @property
    def length(self) -> int:
        """How many blocks it is."""
        return self.span[1] - self.span[0]


def better_focus(
    me: Hosting, loaded: Loaded, coverage: Coverage, policy: FocusPolicy = FocusPolicy()
) -> tuple[Focus, Quality] | None:
    """What `me` should host instead of what it does, and what the swarm is like now; None if it is well as it is.

    No block loses its last server, nor its second but to give another its first; of what covers equally much, the
    bottleneck decides.

    Args:
        coverage: that of all others.
    """
    if _is_of_no_account(loaded, coverage, policy):
        return None
    with_me = coverage.copy()
    with_me.add(me.span, me.steps_per_s)
    now = with_me.quality()
    parts = _rescuing(me, loaded, coverage, policy, now) or list(_parts(me, loaded, coverage, policy, alone=False))
    covering = max(((part.quality.uncovered, part.quality.single) for part in parts), default=(-coverage.num_blocks, 0))
    if covering < (now.uncovered, now.single):
        return None
    parts = [part for part in parts if (part.quality.uncovered, part.quality.single) == covering]
    fastest = max(part.quality.bottleneck for part in parts)
    is_for_speed = covering == (now.uncovered, now.single)
    if is_for_speed and fastest < (1 + policy.least_gain) * now.bottleneck:
        return None
    good = [part for part in parts if part.quality.bottleneck >= policy.as_good * fastest]
    best = max(good, key=lambda part: (part.length, part.quality.bottleneck, -part.span[0]))
    return (best, now) if best.span != me.span else None


def may_give_up(old: Span, new: Span, coverage: Coverage, *, alone: bool) -> bool:
    """Whether who hosts `new` instead of `old` takes no last server from a block, nor (unless `alone`) the second."""
    kept = range(*new)
    return all(coverage.servers[block] > (0 if alone else 1) for block in range(*old) if block not in kept)


def _rescuing(me: Hosting, loaded: Loaded, coverage: Coverage, policy: FocusPolicy, now: Quality) -> list[Focus]:
    """The parts that give some block its first server; others may lose their second one for it."""
    if now.uncovered == 0:
        return []
    return [part for part in _parts(me, loaded, coverage, policy, alone=True) if part.quality.uncovered > now.uncovered]


def _parts(me: Hosting, loaded: Loaded, coverage: Coverage, policy: FocusPolicy, *, alone: bool) -> Iterator[Focus]:
    """The best of each length: everything, and what is as long as a tile, but may begin anywhere."""
    needed = np.flatnonzero(coverage.servers[me.start : me.end] <= (0 if alone else 1)) + me.start
    first, last = (needed[0], needed[-1]) if len(needed) else (coverage.num_blocks, -1)
    shortest = policy.narrowest * loaded.length
    lengths = {length for length in tile_lengths(coverage.num_blocks) if shortest <= length < loaded.length}
    for length in [loaded.length, *sorted(lengths, reverse=True)]:
        starts = np.arange(coverage.num_blocks - length + 1)
        allowed = (starts >= loaded.start) & (starts + length <= loaded.end) & (starts <= first)
        allowed &= starts + length > last
        if not allowed.any():
            continue
        steps_per_s = loaded.capacity.steps_per_s(length)
        qualities = coverage.qualities_with(length, steps_per_s)
        start = qualities.best(allowed)
        yield Focus((start, start + length), steps_per_s, qualities[start])


def _is_of_no_account(loaded: Loaded, coverage: Coverage, policy: FocusPolicy) -> bool:
    """Whether no focus can be worth a change: for swarms of thousands, whose servers look every minute."""
    if coverage.servers.min() < 2:
        return False
    fastest = loaded.capacity.steps_per_s(max(1, int(policy.narrowest * loaded.length)))
    return coverage.gains_at_most(fastest) < policy.least_gain * float(coverage.steps_per_s.min())
