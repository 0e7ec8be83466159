"""Expert servers come, load, serve and go: whether every expert has a server, and what their work is like."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from statistics import fmean

import numpy as np

from swarm.placement import ExpertCoverage, ExpertDemand, ExpertHost
from swarm.placement.expert_demand import Activations
from swarm.simulation.expert_dispatch import Dispatched, dispatch
from swarm.simulation.expert_strategies import ExpertStrategy
from swarm.simulation.expert_world import ExpertWorld

PATIENCE = 1.5
"""Of layer servers, where servers are busy."""


@dataclass(frozen=True)
class ExpertOutcome:
    """What became of a simulated swarm, from when all have come until the end."""

    uncovered_time: float
    """The share of time in which some expert had no server."""
    single_time: float
    """In which some expert had one server or none."""
    messages: float
    """For each token and block, on average, if nothing matters but that they are few."""
    messages_busy: float
    """The same if everybody is busy, and layer servers have a patience of 1.5."""
    busiest: float
    """The busiest server's load over that of all together, in the latter case; 1 were perfect."""
    most_memory: float
    """What experts take of the memory of the server where they take the largest share of it."""
    servers: float
    """That serve, on average."""


def simulate_experts(
    world: ExpertWorld, strategy: ExpertStrategy, on_time: Callable[[float], object] = lambda _: None
) -> ExpertOutcome:
    """Run a swarm from its first expert server to the end of its time.

    Machines, lives and tokens do not depend on the strategy. Servers choose when they come, and keep what they have.

    Args:
        on_time: called with the simulated seconds that have passed, whenever something has happened.
    """
    return _Swarm(world, strategy, on_time).run()


class _Swarm:
    def __init__(self, world: ExpertWorld, strategy: ExpertStrategy, on_time: Callable[[float], object]) -> None:
        self._world, self._strategy, self._on_time = world, strategy, on_time
        self._nature, self._random = Random(world.seed), np.random.default_rng(world.seed + 1)
        tokens = world.tokens_of()
        self._demand = ExpertDemand.of(tokens.take(world.learned_tokens), world.model.blocks)
        self._looks = [tokens.take(world.tokens) for _ in range(world.looks)]
        self._now_s = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()
        self._seen: dict[str, ExpertHost] = {}
        self._serving: dict[str, ExpertHost] = {}
        self._coverage = ExpertCoverage(world.model.shape)
        """Of those that serve; only its copies are kept up."""
        self._uncovered_s = self._single_s = self._most_memory = 0.0
        self._found: list[tuple[Dispatched, Dispatched, int]] = []

    def run(self) -> ExpertOutcome:
        world = self._world
        steady_s = world.duration_s - world.steady_from_s
        for at_s in world.arrivals(self._nature):
            self._at(at_s, self._arrive)
        for number, activations in enumerate(self._looks):
            at_s = world.steady_from_s + steady_s * (number + 0.5) / len(self._looks)
            self._at(at_s, lambda activations=activations: self._look(activations))  # type: ignore[misc]
        self._at(world.duration_s, lambda: None)
        while self._events and self._events[0][0] <= world.duration_s:
            at_s, _, happens = heapq.heappop(self._events)
            self._pass_until(at_s)
            happens()
            self._on_time(at_s)
        few, busy, servers = zip(*self._found, strict=True)
        return ExpertOutcome(
            uncovered_time=self._uncovered_s / steady_s,
            single_time=self._single_s / steady_s,
            messages=fmean(one.messages for one in few),
            messages_busy=fmean(one.messages for one in busy),
            busiest=fmean(one.busiest for one in busy),
            most_memory=self._most_memory,
            servers=fmean(servers),
        )

    def _at(self, at_s: float, happens: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at_s, next(self._number), happens))

    def _pass_until(self, at_s: float) -> None:
        """Nothing happens."""
        passed_s = max(at_s - max(self._now_s, self._world.steady_from_s), 0.0)
        copies = self._coverage.copies[self._coverage.exists].min()
        self._uncovered_s += passed_s if copies == 0 else 0.0
        self._single_s += passed_s if copies <= 1 else 0.0
        self._now_s = at_s

    def _arrive(self) -> None:
        world, nature = self._world, self._nature
        me = world.joiner(f"peer{next(self._number):08d}", nature)
        life_s, load_s = nature.expovariate(1 / world.mean_life_s), nature.uniform(*world.load_s)
        coverage = ExpertCoverage.of(self._seen.values(), world.model.shape, self._demand)
        host = ExpertHost(
            me.peer_id, self._strategy(me, coverage, world.model, self._demand, self._random), me.capacity
        )
        taken_bytes = sum(map(len, host.experts.values())) * world.model.expert_bytes
        self._most_memory = max(self._most_memory, taken_bytes / me.memory_bytes)
        self._seen[me.peer_id] = host
        if load_s < life_s:
            self._at(self._now_s + load_s, lambda: self._serve(host))
        self._at(self._now_s + life_s, lambda: self._vanish(host))
        self._at(self._now_s + life_s + world.lease_s, lambda: self._see_no_more(host))

    def _serve(self, host: ExpertHost) -> None:
        self._serving[host.peer_id] = host
        self._coverage.copies += self._coverage.flags(host.experts)

    def _vanish(self, host: ExpertHost) -> None:
        if self._serving.pop(host.peer_id, None) is not None:
            self._coverage.copies -= self._coverage.flags(host.experts)

    def _see_no_more(self, host: ExpertHost) -> None:
        del self._seen[host.peer_id]

    def _look(self, activations: Activations) -> None:
        hosts = list(self._serving.values())
        self._found.append((dispatch(hosts, activations), dispatch(hosts, activations, patience=PATIENCE), len(hosts)))
