"""How servers decide: our placement, and what others do, to compare it with."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Protocol

import numpy as np

from swarm.placement import Capacity, Coverage, Hosting, Move, MovePolicy, Span
from swarm.placement.join import best_start, blocks_to_host, settle_over
from swarm.placement.moves import Urgency, may_move_over, wanted_over


class Strategy(Protocol):
    """What a server does with what it sees. Coverages are those of all others, as they are seen."""

    name: str
    check_s: float | None
    """A server considers a move about so often; None: never."""
    claims: bool
    """It tells the others, and waits, before it moves."""

    def join(self, coverage: Coverage, capacity: Capacity, random: Random) -> Span:
        """Where a newcomer begins to load."""

    def settle(self, me: Hosting, joining: Sequence[Hosting], coverage: Coverage) -> Span:
        """Where it really goes, once it sees who else is joining; `coverage` is without these."""

    def wants(self, me: Hosting, coverage: Coverage, servers: Sequence[Hosting], random: Random) -> Move | None:
        """The move that it would make; `servers` are all that are seen."""

    def may(self, move: Move, me: Hosting, claims: Sequence[Move], coverage: Coverage, servers: int) -> bool:
        """Whether it is its turn."""


class Ours:
    """:mod:`swarm.placement`, as live servers use it."""

    name, check_s, claims = "ours", 60.0, True

    def __init__(self, policy: MovePolicy | None = None) -> None:
        self._policy = policy or MovePolicy()

    def join(self, coverage: Coverage, capacity: Capacity, random: Random) -> Span:
        length = blocks_to_host(coverage, capacity)
        start = best_start(coverage, length, capacity.steps_per_s(length))
        return start, start + length

    def settle(self, me: Hosting, joining: Sequence[Hosting], coverage: Coverage) -> Span:
        return settle_over(me, joining, coverage)

    def wants(self, me: Hosting, coverage: Coverage, servers: Sequence[Hosting], random: Random) -> Move | None:
        return wanted_over(me, coverage, self._policy)

    def may(self, move: Move, me: Hosting, claims: Sequence[Move], coverage: Coverage, servers: int) -> bool:
        return may_move_over(move, me, claims, coverage, servers, self._policy)


class Alone:
    """What servers have in common that neither look again after they have chosen, nor agree with others."""

    name, claims = "greedy", False
    check_s: float | None = None

    def join(self, coverage: Coverage, capacity: Capacity, random: Random) -> Span:
        return _lexicographic(coverage.steps_per_s, min(capacity.max_blocks, coverage.num_blocks))

    def settle(self, me: Hosting, joining: Sequence[Hosting], coverage: Coverage) -> Span:
        return me.span

    def wants(self, me: Hosting, coverage: Coverage, servers: Sequence[Hosting], random: Random) -> Move | None:
        return None

    def may(self, move: Move, me: Hosting, claims: Sequence[Move], coverage: Coverage, servers: int) -> bool:
        return True


class Random_(Alone):
    """Anywhere."""

    name = "random"

    def join(self, coverage: Coverage, capacity: Capacity, random: Random) -> Span:
        length = min(capacity.max_blocks, coverage.num_blocks)
        start = random.randrange(coverage.num_blocks - length + 1)
        return start, start + length


class PetalsRule(Alone):
    """As described in the Petals paper (arXiv:2312.08361, 3.2 and its appendix) and its documentation, written anew.

    A newcomer takes the span whose sorted throughputs are least, worst block first. Each server considers now and then,
    on its own, how much better the swarm would be if everybody moved greedily until nobody wants to; if it now reaches
    less than 0.75 of that, the server leaves and joins again.
    """

    name, check_s = "Petals' rule", 90.0
    _QUALITY = 0.75
    _ROUNDS = 3

    def __init__(self) -> None:
        self._estimate: tuple[int, float] = (-1, 0.0)
        self._asked = 0

    def wants(self, me: Hosting, coverage: Coverage, servers: Sequence[Hosting], random: Random) -> Move | None:
        now = coverage.steps_per_s.copy()
        now[me.start : me.end] += me.steps_per_s
        new = _lexicographic(coverage.steps_per_s, me.length)
        if new == me.span or now.min() >= self._QUALITY * self._possible(servers, coverage.num_blocks, random):
            return None
        return Move(me.peer_id, me.span, new, Urgency.SPEED, 0.0, me.steps_per_s)

    def _possible(self, servers: Sequence[Hosting], num_blocks: int, random: Random) -> float:
        """The bottleneck after everybody has moved greedily; one estimate serves as many as there are servers."""
        generation = self._asked // max(1, len(servers))
        self._asked += 1
        if self._estimate[0] != generation:
            placed = {one.peer_id: one for one in servers}
            speed = np.zeros(num_blocks)
            for one in servers:
                speed[one.start : one.end] += one.steps_per_s
            for _ in range(self._ROUNDS):
                changed = False
                for one in random.sample(list(placed.values()), len(placed)):
                    speed[one.start : one.end] -= one.steps_per_s
                    start, end = _lexicographic(speed, one.length)
                    speed[start:end] += one.steps_per_s
                    changed |= (start, end) != one.span
                    placed[one.peer_id] = Hosting(one.peer_id, start, end, one.steps_per_s)
                if not changed:
                    break
            self._estimate = generation, float(speed.min())
        return self._estimate[1]


STRATEGIES: dict[str, type[Ours | Alone]] = {one.name: one for one in (Ours, PetalsRule, Alone, Random_)}
"""By name, ours first."""


def _lexicographic(steps_per_s: np.ndarray, length: int) -> Span:
    """The window whose throughputs, sorted, come first in the order of dictionaries."""
    windows = np.sort(np.lib.stride_tricks.sliding_window_view(np.maximum(steps_per_s, 0).round(6), length), axis=1)
    start = int(np.lexsort(windows.T[::-1])[0])
    return start, start + length
