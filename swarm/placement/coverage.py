"""How well the blocks of a model are covered, and what one more span would change. Arrays, for swarms of thousands."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from swarm.placement.hosting import Hosting, Span

UNKNOWN_STEPS_PER_S = 1e-3
"""A server that does not know its speed counts as slow, not as nothing."""
_SHARPNESS = 30
"""Of the soft minimum: the higher, the less blocks beside the slowest count."""

_NEXT_TO_NOTHING = 1e-9
_AS_GOOD = 0.995
"""Placements whose bottleneck reaches this share of the best one's are hardly worse."""

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
Flags = NDArray[np.bool_]


class Quality(NamedTuple):
    """How good a placement is. Of two, the greater is better: first every block has a server, then two, then speed."""

    uncovered: int
    """Blocks without a server, negative."""
    single: int
    """Blocks with one server or none, negative."""
    bottleneck: float
    """Decode steps per second through the slowest block: a soft minimum over those that have a server, so that it
    also tells two placements apart that have the same slowest block."""


@dataclass(frozen=True)
class Qualities:
    """What placements are like that differ in where one span begins; arrays ``[starts]``, see :class:`Quality`."""

    uncovered: Counts
    single: Counts
    bottleneck: Floats

    def __getitem__(self, start: int) -> Quality:
        return Quality(int(self.uncovered[start]), int(self.single[start]), float(self.bottleneck[start]))

    def best(self, allowed: Flags) -> list[int]:
        """The starts, of those that are `allowed`, that are as good as the best one or hardly worse; the best first."""
        for counts in (self.uncovered, self.single):
            allowed = allowed & (counts == counts[allowed].max())
        bottleneck = np.where(allowed, self.bottleneck, -1.0)
        best = int(bottleneck.argmax())
        good = np.flatnonzero(bottleneck >= _AS_GOOD * bottleneck[best])
        return [best, *(int(start) for start in good if start != best)]


class Coverage:
    """Servers and speed of each block.

    Attributes:
        servers: int64 ``[num_blocks]``: how many servers host it.
        steps_per_s: float64 ``[num_blocks]``: what they do together.
    """

    def __init__(self, num_blocks: int) -> None:
        self.servers: Counts = np.zeros(num_blocks, np.int64)
        self.steps_per_s: Floats = np.zeros(num_blocks)

    @classmethod
    def of(cls, hostings: Iterable[Hosting], num_blocks: int) -> Coverage:
        """Of all that do not drain. Spans that reach beyond the model are cut."""
        coverage = cls(num_blocks)
        for one in hostings:
            if not one.is_draining:
                coverage.add(one.span, one.steps_per_s)
        return coverage

    @property
    def num_blocks(self) -> int:
        return len(self.servers)

    def add(self, span: Span, steps_per_s: float) -> None:
        """A server comes."""
        here = _slice(span)
        self.servers[here] += 1
        self.steps_per_s[here] += max(steps_per_s, UNKNOWN_STEPS_PER_S)

    def remove(self, span: Span, steps_per_s: float) -> None:
        """A server that was added goes."""
        here = _slice(span)
        self.servers[here] -= 1
        self.steps_per_s[here] -= max(steps_per_s, UNKNOWN_STEPS_PER_S)
        self.steps_per_s[self.servers == 0] = 0.0  # rounding leaves a trace

    def quality(self) -> Quality:
        """As it is."""
        covered = self.servers > 0
        bottleneck = _soft_minimum(self.steps_per_s[covered]) if covered.any() else 0.0
        return Quality(-int((~covered).sum()), -int((self.servers < 2).sum()), bottleneck)

    def usual_steps_per_s(self) -> float:
        """What a server does, on average over the blocks that have one."""
        covered = self.servers > 0
        return float((self.steps_per_s[covered] / self.servers[covered]).mean()) if covered.any() else 0.0

    def copy(self) -> Coverage:
        """One that can be changed."""
        other = Coverage(0)
        other.servers, other.steps_per_s = self.servers.copy(), self.steps_per_s.copy()
        return other

    def qualities_with(self, length: int, steps_per_s: float) -> Qualities:
        """What would be if one more server hosted `length` blocks from block 0 on, from block 1 on, …"""
        added = max(steps_per_s, UNKNOWN_STEPS_PER_S)
        none, one = self.servers == 0, self.servers == 1
        uncovered = none.sum() - _windows(none.astype(np.float64), length)
        single = none.sum() + one.sum() - _windows(one.astype(np.float64), length)
        scale = float(self.steps_per_s.mean()) or added
        relative = self.steps_per_s / scale
        badness = np.where(none, 0.0, np.maximum(relative, _NEXT_TO_NOTHING) ** -_SHARPNESS)
        better = (relative + added / scale) ** -_SHARPNESS
        # Not `badness.sum() - …`: what is left beside a far worse block would be lost in rounding.
        before = np.concatenate([[0.0], np.cumsum(badness)])
        after = np.concatenate([np.cumsum(badness[::-1])[::-1], [0.0]])
        total = before[: len(uncovered)] + _windows(better, length) + after[length:]
        bottleneck = scale * (total / (self.num_blocks - uncovered)) ** (-1 / _SHARPNESS)
        return Qualities(-uncovered.astype(np.int64), -single.astype(np.int64), bottleneck)


def _slice(span: Span) -> slice:
    return slice(max(span[0], 0), max(span[1], 0))


def _windows(values: Floats, length: int) -> Floats:
    """Sums over each `length` consecutive values."""
    return np.convolve(values, np.ones(length), "valid")


def _soft_minimum(values: Floats) -> float:
    scale = float(values.mean())
    mean = float(np.mean(np.maximum(values / scale, _NEXT_TO_NOTHING) ** -_SHARPNESS))
    return float(scale * mean ** (-1 / _SHARPNESS))
