"""What became of a simulated swarm: its course, and what it amounts to."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Sample:
    """The swarm at one moment."""

    at_s: float
    servers: int
    """That serve."""
    uncovered: int
    """Blocks without a server."""
    single: int
    """Blocks with one server or none."""
    steps_per_s: float
    """Through the slowest block."""
    bound_steps_per_s: float
    """Through the mean block: no placement of the same spans can be faster."""
    moves: int
    """So far."""
    blocks_each: float = 0.0
    """That a server hosts, on average."""

    @property
    def share_of_bound(self) -> float:
        return self.steps_per_s / self.bound_steps_per_s if self.bound_steps_per_s else 0.0


@dataclass
class Outcome:
    """All samples of a run, and what lies between them."""

    samples: list[Sample] = field(default_factory=list)
    moves_at_s: list[float] = field(default_factory=list)
    uncovered_from_to_s: list[tuple[float, float]] = field(default_factory=list)
    """The times at which some block had no server."""
    mass_failure_at_s: float | None = None
    refocused_at_s: list[float] = field(default_factory=list)
    """When servers changed which part of what they had loaded they host: nothing is loaded, no session is moved."""

    def share_of_bound(self, begin_s: float, end_s: float) -> float:
        """The mean between two moments."""
        return _mean(one.share_of_bound for one in self._between(begin_s, end_s))

    def uncovered_share(self, begin_s: float, end_s: float) -> float:
        """The share of time, between two moments, in which some block had no server."""
        without = sum(
            max(0.0, min(to, end_s) - max(since, begin_s)) for since, to in self.uncovered_from_to_s
        )  # fmt: skip
        return without / (end_s - begin_s)

    def moves_per_server_hour(self, begin_s: float, end_s: float) -> float:
        """Between two moments."""
        hours = (end_s - begin_s) / 3600 * _mean(one.servers for one in self._between(begin_s, end_s))
        moves = sum(begin_s <= at_s < end_s for at_s in self.moves_at_s)
        return moves / hours if hours else 0.0

    def steps_per_s(self, begin_s: float, end_s: float) -> float:
        """Through the slowest block, the mean between two moments."""
        return _mean(one.steps_per_s for one in self._between(begin_s, end_s))

    def blocks_each(self, begin_s: float, end_s: float) -> float:
        """That a server hosts, the mean between two moments."""
        return _mean(one.blocks_each for one in self._between(begin_s, end_s))

    def recovery_s(self) -> float:
        """From the mass failure until every block had a server again; 0: none was without."""
        if self.mass_failure_at_s is None:
            return 0.0
        lost = [(since, to) for since, to in self.uncovered_from_to_s if since <= self.mass_failure_at_s + 1e-9 < to]
        return max((to - self.mass_failure_at_s for _, to in lost), default=0.0)

    def _between(self, begin_s: float, end_s: float) -> Sequence[Sample]:
        return [one for one in self.samples if begin_s <= one.at_s < end_s]


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return statistics.fmean(found) if found else 0.0
