"""What happens to simulated expert servers: who comes with what machine, and what tokens choose. Seeded."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray

from swarm.placement import ExpertJoiner
from swarm.placement.expert_demand import Activations
from swarm.simulation.world import MACHINES, World


@dataclass(frozen=True)
class ExpertModel:
    """The shape of a mixture of experts."""

    name: str
    shape: tuple[int, ...]
    """How many experts each block has; 0: dense."""
    chosen: int
    """By each token, in each block with experts."""
    expert_bytes: int

    @property
    def blocks(self) -> dict[int, int]:
        """How many experts each block has that has any."""
        return {block: experts for block, experts in enumerate(self.shape) if experts}

    @property
    def total_bytes(self) -> int:
        """Of all experts."""
        return sum(self.shape) * self.expert_bytes


MODELS = {
    one.name: one
    for one in (
        ExpertModel("mixtral", (8,) * 32, 2, 99_000_000),
        ExpertModel("qwen3", (128,) * 94, 8, 10_600_000),
        ExpertModel("deepseek", (0,) * 3 + (256,) * 58, 8, 24_800_000),
    )
}
"""Like Mixtral 8x7B, Qwen3 235B-A22B and DeepSeek-V3, at 4.5 bits a weight."""


@dataclass(frozen=True)
class ExpertWorld:
    """A model and the people who host its experts. Times in seconds."""

    model: ExpertModel = MODELS["deepseek"]
    servers: int = 16
    """As many as there are on average, once all have come."""
    copies: float = 2.5
    """The memory of so many servers, on average, is that of so many copies of all experts."""
    zipf: float = 0.8
    """Within a block, the n-th most popular expert is chosen as often as n to the power of minus this."""
    topics: int = 16
    """Each token has one, the same in all blocks."""
    preferred: float = 0.125
    """Of each block's experts, a topic prefers so many; which is a matter of chance."""
    topicality: float = 0.6
    """So much of a token's choice is among what its topic prefers; by popularity, as is the rest."""
    learned_tokens: int = 2000
    """So many others' choices are known when experts are placed."""
    tokens: int = 60
    """So many are looked at, at each look."""
    looks: int = 3
    """At the whole swarm, between when all have come and the end."""
    duration_s: float = 3600.0
    ramp_s: float = 600.0
    mean_life_s: float = 4 * 3600.0
    """As in :class:`~swarm.simulation.World`."""
    load_s: tuple[float, float] = (30.0, 90.0)
    """From the choice of experts until they are served."""
    lease_s: float = 12.0
    """Who goes is seen for so long."""
    seed: int = 0

    @property
    def steady_from_s(self) -> float:
        """All have come, and have loaded."""
        return min(self.ramp_s + self.load_s[1], self.duration_s / 2)

    def arrivals(self, random: Random) -> Iterator[float]:
        """When servers come."""
        return World(
            servers=self.servers, duration_s=self.duration_s, ramp_s=self.ramp_s, mean_life_s=self.mean_life_s
        ).arrivals(random)

    def joiner(self, peer_id: str, random: Random) -> ExpertJoiner:
        """One more machine: memory in the proportions of real ones, its speed that of reading experts from memory."""
        usual_gb = statistics.fmean([one.memory_gb for one in MACHINES], [one.share for one in MACHINES])
        machine = random.choices(MACHINES, [one.share for one in MACHINES])[0]
        memory_bytes = int(machine.memory_gb / usual_gb * self.copies * self.model.total_bytes / self.servers)
        return ExpertJoiner(peer_id, memory_bytes, machine.bandwidth_gb_per_s * 1e9 / self.model.expert_bytes)

    def tokens_of(self) -> Tokens:
        """What they choose."""
        return Tokens(self)


class Tokens:
    """A source of tokens, with the same tastes throughout."""

    def __init__(self, world: ExpertWorld) -> None:
        self._world, self._random = world, np.random.default_rng(world.seed)
        self._tastes = {block: self._tastes_in(experts) for block, experts in world.model.blocks.items()}

    def take(self, count: int) -> Activations:
        """What the next so many choose, by block: ``[count, chosen]``."""
        topic, chosen = self._random.integers(self._world.topics, size=count), self._world.model.chosen
        activations = {}
        for block, tastes in self._tastes.items():
            # The largest of these are a draw without replacement, each with its probability (Gumbel's trick).
            marks = tastes[topic] + self._random.gumbel(size=(count, tastes.shape[1]))
            activations[block] = np.argpartition(-marks, chosen - 1, axis=1)[:, :chosen].astype(np.int64)
        return activations

    def _tastes_in(self, experts: int) -> NDArray[np.float64]:
        """``[topics, experts]``: logarithms of probabilities."""
        world, random = self._world, self._random
        popularity = random.permutation(np.arange(1.0, experts + 1) ** -world.zipf)
        popularity /= popularity.sum()
        tastes = np.tile((1 - world.topicality) * popularity, (world.topics, 1))
        count = max(world.model.chosen, round(world.preferred * experts))
        for topic in range(world.topics):
            liked = random.choice(experts, min(count, experts), replace=False)
            tastes[topic, liked] += world.topicality * popularity[liked] / popularity[liked].sum()
        return np.log(np.maximum(tastes, 1e-300))
