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
    all_cover_as_much: bool = False
    """Known to be so: in a large swarm nothing needs to be counted."""

    def __getitem__(self, start: int) -> Quality:
        return Quality(int(self.uncovered[start]), int(self.single[start]), float(self.bottleneck[start]))

    def best(self, allowed: Flags | None = None) -> int:
        """The best start; of equals the first."""
        return int(self._comparable(allowed).argmax())

    def good(self, allowed: Flags | None = None) -> list[int]:
        """The starts that are as good as the best one or hardly worse; the best first."""
        bottleneck = self._comparable(allowed)
        best = int(bottleneck.argmax())
        good = np.flatnonzero(bottleneck >= _AS_GOOD * bottleneck[best])
        return [best, *(int(start) for start in good if start != best)]

    def covers_as_much(self, one: int, other: int) -> bool:
        """Whether with both starts as many blocks have a server, and two."""
        return bool(self.uncovered[one] == self.uncovered[other] and self.single[one] == self.single[other])

    def _comparable(self, allowed: Flags | None) -> Floats:
        """The bottleneck where neither it is forbidden to begin nor fewer blocks than possible are covered; else -1."""
        bottleneck = self.bottleneck if allowed is None else np.where(allowed, self.bottleneck, -1.0)
        if self.all_cover_as_much:
            return bottleneck
        for counts in (self.uncovered, self.single):
            most = counts.max() if allowed is None else counts[allowed].max()
            if counts.min() < most:
                allowed = counts == most if allowed is None else allowed & (counts == most)
                bottleneck = np.where(allowed, bottleneck, -1.0)
        return bottleneck


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

    def gains_at_most(self, steps_per_s: float) -> float:
        """No more does the bottleneck rise when a server joins; not counting blocks that had none."""
        # The derivatives of a power mean of power -p, of n values, add up to no more than n ** (1 / p).
        return float(max(steps_per_s, UNKNOWN_STEPS_PER_S) * self.num_blocks ** (1 / _SHARPNESS))

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
        starts = self.num_blocks - length + 1
        uncovered = single = np.zeros(starts, np.int64)
        all_have_two = bool(self.servers.min() >= 2)
        if not all_have_two:
            uncovered = _counts_outside(self.servers == 0, length)
            single = (self.servers == 0).sum() + _counts_outside(self.servers == 1, length)
        scale = float(self.steps_per_s.sum()) / self.num_blocks or added
        relative = self.steps_per_s / scale
        badness = np.maximum(relative, _NEXT_TO_NOTHING) ** -_SHARPNESS
        badness[self.servers == 0] = 0.0
        better = (relative + added / scale) ** -_SHARPNESS
        # Not `badness.sum() - …`: what is left beside a far worse block would be lost in rounding.
        before, after = np.zeros(starts), np.zeros(starts)
        np.cumsum(badness[: starts - 1], out=before[1:])
        np.cumsum(badness[: length - 1 : -1], out=after[-2::-1])
        total = before + _windows(better, length) + after
        bottleneck = scale * (total / (self.num_blocks - uncovered)) ** (-1 / _SHARPNESS)
        return Qualities(-uncovered, -single, bottleneck, all_have_two)


def _slice(span: Span) -> slice:
    return slice(max(span[0], 0), max(span[1], 0))


def _windows(values: Floats, length: int) -> Floats:
    """Sums over each `length` consecutive values."""
    return np.convolve(values, np.ones(length), "valid")


def _counts_outside(flags: Flags, length: int) -> Counts:
    """How many flags are set outside each `length` consecutive ones."""
    sums = np.zeros(len(flags) + 1, np.int64)
    np.cumsum(flags, out=sums[1:])
    outside: Counts = sums[-1] - (sums[length:] - sums[:-length])
    return outside


def _soft_minimum(values: Floats) -> float:
    scale = float(values.sum()) / len(values)
    mean = float(np.mean(np.maximum(values / scale, _NEXT_TO_NOTHING) ** -_SHARPNESS))
    return float(scale * mean ** (-1 / _SHARPNESS))
