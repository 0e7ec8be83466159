"""How servers decide: our placement, and what others do, to compare it with."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from random import Random
from typing import Protocol

import numpy as np

from swarm.placement import Capacity, Coverage, Hosting, Loaded, Move, MovePolicy, Span
from swarm.placement.join import best_start, blocks_to_host, settle_over
from swarm.placement.moves import Urgency, wanted_over
from swarm.placement.tiles import tile_starts
from swarm.placement.turns import may_move_over


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

    def wants(
        self, me: Hosting, loaded: Loaded, coverage: Coverage, servers: Collection[Hosting], random: Random
    ) -> Move | None:
        """The move that it would make; `servers` are all that are seen."""

    def may(
        self, move: Move, me: Hosting, loaded: Loaded, claims: Sequence[Move], coverage: Coverage, servers: int
    ) -> bool:
        """Whether it is its turn."""


class Ours:
    """:mod:`swarm.placement`, as live servers use it whose owners leave the number of blocks to them."""

    name, check_s, claims = "ours", 60.0, True

    def __init__(self, policy: MovePolicy | None = None) -> None:
        self._policy = policy or MovePolicy()

    def join(self, coverage: Coverage, capacity: Capacity, random: Random) -> Span:
        length = blocks_to_host(coverage, capacity)
        tiles = tile_starts(length, coverage.num_blocks)
        start = best_start(coverage, length, capacity.steps_per_s(length), preferred=tiles)
        return start, start + length

    def settle(self, me: Hosting, joining: Sequence[Hosting], coverage: Coverage) -> Span:
        return settle_over(me, joining, coverage, tiles=True)

    def wants(
        self, me: Hosting, loaded: Loaded, coverage: Coverage, servers: Collection[Hosting], random: Random
    ) -> Move | None:
        return wanted_over(me, coverage, self._policy, loaded=loaded)

    def may(
        self, move: Move, me: Hosting, loaded: Loaded, claims: Sequence[Move], coverage: Coverage, servers: int
    ) -> bool:
        return may_move_over(move, me, claims, coverage, servers, self._policy, loaded=loaded)


class Alone:
    """What servers have in common that neither look again after they have chosen, nor agree with others."""

    name, claims = "greedy", False
    check_s: float | None = None

    def join(self, coverage: Coverage, capacity: Capacity, random: Random) -> Span:
        return _lexicographic(coverage.steps_per_s, min(capacity.max_blocks, coverage.num_blocks))

    def settle(self, me: Hosting, joining: Sequence[Hosting], coverage: Coverage) -> Span:
        return me.span

    def wants(
        self, me: Hosting, loaded: Loaded, coverage: Coverage, servers: Collection[Hosting], random: Random
    ) -> Move | None:
        return None

    def may(
        self, move: Move, me: Hosting, loaded: Loaded, claims: Sequence[Move], coverage: Coverage, servers: int
    ) -> bool:
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
    on its own, how much better the swarm would be if it, and then everybody, moved greedily until nobody wants to; if
    the swarm now reaches less than 0.75 of that, the server leaves and joins again, unless a block would be without a
    server meanwhile. What its server checks every 60 or 120 s, as its documentation says in two places, is checked
    every 90 s here.
    """

    name, check_s = "Petals' rule", 90.0
    _QUALITY = 0.75
    _HARDLY_MORE = 1e-3
    _ROUNDS = 20
    """It would go on for ever where servers go round in circles; that was not seen within so many rounds."""

    def wants(
        self, me: Hosting, loaded: Loaded, coverage: Coverage, servers: Collection[Hosting], random: Random
    ) -> Move | None:
        others, now = coverage.steps_per_s, coverage.steps_per_s.copy()
        now[me.start : me.end] += me.steps_per_s
        slowest = float(now.min())
        if slowest >= self._QUALITY * now.mean():
            return None  # as no placement is faster than the mean block, it need not be estimated
        if slowest > self._HARDLY_MORE and others.min() <= 0:
            return None
        new = self._best(now, me)
        if new == me.span:
            return None
        possible = self._possible(me, new, servers, coverage.num_blocks, random)
        if possible < max(slowest, self._HARDLY_MORE) or slowest >= (self._QUALITY - self._HARDLY_MORE) * possible:
            return None
        return Move(me.peer_id, me.span, new, Urgency.SPEED, 0.0, me.steps_per_s, me.steps_per_s)

    def _possible(self, me: Hosting, new: Span, servers: Collection[Hosting], num_blocks: int, random: Random) -> float:
        """The bottleneck after `me` and then everybody has moved greedily."""
        placed = {one.peer_id: one for one in servers} | {me.peer_id: replace(me, start=new[0], end=new[1])}
        speed = np.zeros(num_blocks)
        for one in placed.values():
            speed[one.start : one.end] += one.steps_per_s
        for _ in range(self._ROUNDS):
            changed = False
            for one in random.sample(list(placed.values()), len(placed)):
                span = self._best(speed, one)
                if span != one.span:
                    speed[one.start : one.end] -= one.steps_per_s
                    speed[slice(*span)] += one.steps_per_s
                    placed[one.peer_id] = replace(one, start=span[0], end=span[1])
                    changed = True
            if not changed:
                break
        return float(speed.min())

    def _best(self, speed: np.ndarray, one: Hosting) -> Span:
        """Where `one` would join again, of those whose `speed` is given; where it is, if that is hardly worse."""
        without = speed.copy()
        without[one.start : one.end] -= one.steps_per_s * (1 + self._HARDLY_MORE)
        return _lexicographic(without, one.length)


STRATEGIES: dict[str, type[Ours | Alone]] = {one.name: one for one in (Ours, PetalsRule, Alone, Random_)}
"""By name, ours first."""


def _lexicographic(steps_per_s: np.ndarray, length: int) -> Span:
    """The window whose throughputs, sorted, come first in the order of dictionaries."""
    windows = np.sort(np.lib.stride_tricks.sliding_window_view(steps_per_s.round(6), length), axis=1)
    start = int(np.lexsort(windows.T[::-1])[0])
    return start, start + length
