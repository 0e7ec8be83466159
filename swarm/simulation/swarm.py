"""Discrete events: servers come, load, serve, move and go; each sees the others a little late."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from swarm.placement import Coverage, Hosting, Loaded, Move, Span
from swarm.simulation.outcome import Outcome, Sample
from swarm.simulation.strategies import Strategy
from swarm.simulation.world import World

SAMPLE_S = 10.0
_SETTLE_VIEWS = 1.5
"""A newcomer looks again after so many times the delay with which others are seen."""
_DRAIN_S = 5.0
_ALARM_S = 10.0
"""Within this time, those who see a block without a server consider a move out of turn."""


@dataclass(eq=False)
class _Server:
    peer_id: str
    region: int
    span: Span
    """What it hosts: what it has loaded, or a part of that."""
    steps_per_s: float
    loaded: Loaded
    is_serving: bool = False
    is_settled: bool = False
    is_moving: bool = False
    is_gone: bool = False
    is_cut_off: bool = False

    @property
    def hosting(self) -> Hosting:
        return Hosting(self.peer_id, *self.span, self.steps_per_s)


def simulate(world: World, strategy: Strategy, on_time: Callable[[float], object] = lambda _: None) -> Outcome:
    """Run a swarm from its first server to the end of its time.

    Args:
        on_time: called with the simulated seconds that have passed, at every sample.
    """
    return _Swarm(world, strategy, on_time).run()


class _Swarm:
    def __init__(self, world: World, strategy: Strategy, on_time: Callable[[float], object]) -> None:
        self._world, self._strategy, self._on_time = world, strategy, on_time
        self._nature = Random(world.seed)  # who comes, stays and dies is the same for all strategies
        self._random = Random(world.seed + 1)
        self._now_s = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()
        self._servers: dict[str, _Server] = {}
        self._serving = Coverage(world.num_blocks)
        self._seen = Coverage(world.num_blocks)
        self._seen_hostings: dict[str, Hosting] = {}
        self._seen_joining: dict[str, Hosting] = {}
        self._seen_claims: dict[str, Move] = {}
        self._was_uncovered_since: float | None = 0.0
        self._outcome = Outcome(mass_failure_at_s=world.mass_failure_at_s)

    def run(self) -> Outcome:
        world = self._world
        for at_s in world.arrivals(self._nature):
            self._at(at_s, self._arrive)
        for number in range(int(world.duration_s / SAMPLE_S) + 1):
            self._at(number * SAMPLE_S, self._sample)
        if world.mass_failure_at_s is not None:
            self._at(world.mass_failure_at_s, self._fail_many)
        if world.partition_at_s is not None:
            self._at(world.partition_at_s, lambda: self._cut_off(True))
            self._at(world.partition_at_s + world.partition_s, lambda: self._cut_off(False))
        while self._events and self._events[0][0] <= world.duration_s:
            self._now_s, _, happens = heapq.heappop(self._events)
            happens()
        self._now_s = world.duration_s
        self._end_uncovered()
        return self._outcome

    def _at(self, at_s: float, happens: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at_s, next(self._number), happens))

    def _after(self, pause_s: float, happens: Callable[[], None]) -> None:
        self._at(self._now_s + pause_s, happens)

    # --- a server's life

    def _arrive(self) -> None:
        world, nature = self._world, self._nature
        capacity, region = world.capacity(nature), nature.randrange(world.regions)
        life_s, crashes = nature.expovariate(1 / world.mean_life_s), nature.random() < world.crashes
        span = self._strategy.join(self._seen, capacity, self._random)
        steps_per_s = capacity.steps_per_s(span[1] - span[0])
        server = _Server(f"peer{next(self._number):08d}", region, span, steps_per_s, Loaded(*span, capacity))
        self._servers[server.peer_id] = server
        self._announce(server, joining=True)
        self._after(_SETTLE_VIEWS * world.view_delay_s, lambda: self._settle(server))
        self._after(life_s, lambda: self._leave(server, crashes=crashes))

    def _settle(self, server: _Server) -> None:
        if server.is_gone:
            return
        joining = [one for one in self._seen_joining.values() if one.peer_id != server.peer_id]
        coverage = self._seen_without(server)
        for one in joining:
            coverage.remove(one.span, one.steps_per_s)
        server.span = self._strategy.settle(server.hosting, joining, coverage)
        server.is_settled = True
        self._announce(server, joining=False)
        self._load(server)
        if self._strategy.check_s is not None:
            self._after(self._random.uniform(0, 2 * self._strategy.check_s), lambda: self._check(server))

    def _load(self, server: _Server) -> None:
        span = server.span
        server.loaded = Loaded(*span, server.loaded.capacity)

        def loaded() -> None:
            if not server.is_gone and server.span == span:
                server.is_moving = False
                self._serve(server)

        self._after(self._random.uniform(*self._world.load_s), loaded)

    def _leave(self, server: _Server, *, crashes: bool) -> None:
        if not server.is_gone:
            self._go(server, seen_for_s=self._world.lease_s if crashes else self._world.view_delay_s)

    def _go(self, server: _Server, *, seen_for_s: float) -> None:
        server.is_gone = True
        self._stop_serving(server)
        del self._servers[server.peer_id]
        self._after(seen_for_s, lambda: self._see_no_more(server))

    # --- moving

    def _check(self, server: _Server) -> None:
        check_s = self._strategy.check_s
        if server.is_gone or check_s is None:
            return
        self._after(check_s * self._random.uniform(0.7, 1.3), lambda: self._check(server))
        self._consider(server)

    def _consider(self, server: _Server) -> None:
        if server.is_gone or server.is_moving or server.is_cut_off or not server.is_serving:
            return
        move = self._strategy.wants(
            server.hosting, server.loaded, self._seen_without(server), self._seen_hostings.values(), self._random
        )  # fmt: skip
        if move is None:
            return
        server.is_moving = True
        if not self._strategy.claims:
            self._begin(server, move)
            return
        self._after(self._world.view_delay_s, lambda: self._seen_claims.__setitem__(server.peer_id, move))
        self._after(_SETTLE_VIEWS * self._world.view_delay_s, lambda: self._begin_if_allowed(server, move))

    def _begin_if_allowed(self, server: _Server, move: Move) -> None:
        claims = [one for one in self._seen_claims.values() if one.peer_id != server.peer_id and self._is_there(one)]
        coverage = self._seen_without(server)
        may = not server.is_gone and self._strategy.may(
            move, server.hosting, server.loaded, claims, coverage, len(self._seen_hostings)
        )  # fmt: skip
        if may:
            self._begin(server, move)
        else:
            server.is_moving = False
        self._after(self._world.view_delay_s, lambda: self._forget_claim(server))

    def _forget_claim(self, server: _Server) -> None:
        self._seen_claims.pop(server.peer_id, None)

    def _is_there(self, claim: Move) -> bool:
        seen = self._seen_hostings.get(claim.peer_id)
        return seen is not None and seen.span == claim.old

    def _begin(self, server: _Server, move: Move) -> None:
        if move.is_focus:
            self._refocus(server, move)
            return
        self._outcome.moves_at_s.append(self._now_s)
        self._announce_at(server, move.new, move.new_steps_per_s)

        def drained() -> None:
            if not server.is_gone:
                self._stop_serving(server)
                server.span, server.steps_per_s = move.new, move.new_steps_per_s
                self._load(server)

        self._after(_DRAIN_S, drained)

    def _refocus(self, server: _Server, move: Move) -> None:
        self._outcome.refocused_at_s.append(self._now_s)
        self._stop_serving(server)
        server.span, server.steps_per_s, server.is_moving = move.new, move.new_steps_per_s, False
        self._serve(server)
        self._announce(server, joining=False)

    # --- what befalls many

    def _fail_many(self) -> None:
        everybody = list(self._servers.values())
        for server in self._nature.sample(everybody, int(self._world.mass_failure_share * len(everybody))):
            self._go(server, seen_for_s=self._world.lease_s)

    def _cut_off(self, cut: bool) -> None:
        """The far side of the partition is as good as gone: this is the view of those who remain."""
        for server in [one for one in self._servers.values() if one.region == 0]:
            server.is_cut_off = cut
            if cut:
                was_serving = server.is_serving
                self._stop_serving(server)
                server.is_serving = was_serving  # over there it is, and it will be here when the way is open again
                self._after(self._world.lease_s, lambda server=server: self._see_no_more(server))  # type: ignore[misc]
            elif server.is_serving:
                server.is_serving = False
                self._serve(server)
                self._announce(server, joining=False)

    # --- what is, and what is seen of it

    def _serve(self, server: _Server) -> None:
        if not server.is_serving:
            server.is_serving = True
            if not server.is_cut_off:
                self._serving.add(server.span, server.steps_per_s)
                self._coverage_changed()

    def _stop_serving(self, server: _Server) -> None:
        if server.is_serving:
            server.is_serving = False
            if not server.is_cut_off or self._servers.get(server.peer_id) is server:
                self._serving.remove(server.span, server.steps_per_s)
                self._coverage_changed()

    def _announce(self, server: _Server, *, joining: bool) -> None:
        self._announce_at(server, server.span, server.steps_per_s, joining=joining)

    def _announce_at(self, server: _Server, span: Span, steps_per_s: float, *, joining: bool = False) -> None:
        hosting = Hosting(server.peer_id, *span, steps_per_s)

        def seen() -> None:
            if server.is_gone:
                return
            self._see_no_more(server)
            self._seen_hostings[hosting.peer_id] = hosting
            self._seen.add(hosting.span, hosting.steps_per_s)
            if joining and not server.is_settled:
                self._seen_joining[hosting.peer_id] = hosting

        self._after(self._world.view_delay_s, seen)

    def _see_no_more(self, server: _Server) -> None:
        self._seen_joining.pop(server.peer_id, None)
        hosting = self._seen_hostings.pop(server.peer_id, None)
        if hosting is not None:
            before = (self._seen.servers == 0).sum()
            self._seen.remove(hosting.span, hosting.steps_per_s)
            if server.is_gone and self._strategy.claims and (self._seen.servers == 0).sum() > before:
                self._alarm()

    def _alarm(self) -> None:
        for server in self._servers.values():
            self._after(self._random.uniform(0, _ALARM_S), lambda server=server: self._consider(server))  # type: ignore[misc]

    def _seen_without(self, server: _Server) -> Coverage:
        coverage, mine = self._seen.copy(), self._seen_hostings.get(server.peer_id)
        if mine is not None:
            coverage.remove(mine.span, mine.steps_per_s)
        return coverage

    def _coverage_changed(self) -> None:
        if (self._serving.servers == 0).any():
            if self._was_uncovered_since is None:
                self._was_uncovered_since = self._now_s
        else:
            self._end_uncovered()

    def _end_uncovered(self) -> None:
        if self._was_uncovered_since is not None:
            self._outcome.uncovered_from_to_s.append((self._was_uncovered_since, self._now_s))
            self._was_uncovered_since = None

    def _sample(self) -> None:
        serving, servers = self._serving, self._serving.servers
        count = sum(one.is_serving for one in self._servers.values())
        self._outcome.samples.append(
            Sample(
                self._now_s,
                count,
                int((servers == 0).sum()),
                int((servers < 2).sum()),
                float(serving.steps_per_s.min()),
                float(serving.steps_per_s.mean()),
                len(self._outcome.moves_at_s),
                float(servers.sum()) / max(1, count),
            )
        )
        self._on_time(self._now_s)
