"""What happens to a simulated swarm: which machines come, when, for how long, and what befalls them. Seeded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from swarm.placement import Capacity


@dataclass(frozen=True)
class Machine:
    """A kind of machine that people donate."""

    name: str
    share: float
    """Of all machines."""
    memory_gb: float
    """Free for blocks."""
    bandwidth_gb_per_s: float
    """Of its memory: a decode step reads every weight once."""
    uplink_mbit_per_s: tuple[float, float]
    """From the slowest to the fastest, evenly in logarithm."""


MACHINES = (
    Machine("RTX 3060", 0.26, 10, 360, (20, 200)),
    Machine("T4", 0.12, 14, 320, (200, 2000)),
    Machine("RTX 3090", 0.18, 21, 936, (20, 500)),
    Machine("RTX 4090", 0.16, 21, 1008, (50, 1000)),
    Machine("A6000", 0.08, 44, 768, (200, 2000)),
    Machine("A100 80GB", 0.06, 74, 2039, (500, 10_000)),
    Machine("workstation without a GPU", 0.14, 56, 60, (20, 1000)),
)
"""Bandwidths from data sheets; shares are a guess at who volunteers: mostly consumer cards."""


@dataclass(frozen=True)
class World:
    """A model and the people who host it. Times in seconds."""

    servers: int = 100
    """As many as there are on average, once all have come."""
    num_blocks: int = 80
    block_gb: float = 0.9
    """Weights of a block: 0.9 is a block of a model of 70 billion parameters in 8 bits, with its share of KV cache."""
    hidden_bytes: int = 16_384
    """Of one position's hidden state on its way."""
    duration_s: float = 3600.0
    ramp_s: float = 600.0
    """Within this time the first servers come, at random moments."""
    mean_life_s: float = 4 * 3600.0
    """Lives are exponentially distributed; for every server that goes, another comes."""
    crashes: float = 0.5
    """The share of servers that vanish without a word; others say goodbye."""
    diurnal: float = 0.0
    """How far the rate of arrivals swings around its mean within a day: 0 … 1."""
    mass_failure_at_s: float | None = None
    mass_failure_share: float = 0.3
    """So many of all servers vanish at that moment."""
    regions: int = 3
    partition_at_s: float | None = None
    """One of the regions cannot be reached from this moment on, …"""
    partition_s: float = 300.0
    """… for so long."""
    load_s: tuple[float, float] = (30.0, 90.0)
    """From the choice of blocks until they are served: from disk or the network."""
    view_delay_s: float = 3.0
    """What somebody announces, others see so much later."""
    lease_s: float = 12.0
    """Who vanished is seen for so long."""
    seed: int = 0

    def capacity(self, random: Random) -> Capacity:
        """Of one more machine."""
        machine = random.choices(MACHINES, [one.share for one in MACHINES])[0]
        slow, fast = machine.uplink_mbit_per_s
        uplink_bytes_per_s = 1e6 / 8 * math.exp(random.uniform(math.log(slow), math.log(fast)))
        return Capacity(
            max_blocks=max(1, min(int(machine.memory_gb / self.block_gb), self.num_blocks)),
            block_steps_per_s=machine.bandwidth_gb_per_s / self.block_gb,
            network_steps_per_s=uplink_bytes_per_s / self.hidden_bytes,
        )

    def arrivals(self, random: Random) -> Iterator[float]:
        """When servers come: the first within the ramp, others as those that go are replaced."""
        yield from sorted(random.uniform(0, self.ramp_s) for _ in range(self.servers))
        at_s, fastest = 0.0, (1 + self.diurnal) * self.servers / self.mean_life_s
        while (at_s := at_s + random.expovariate(fastest)) < self.duration_s:
            rate = 1 + self.diurnal * math.sin(2 * math.pi * at_s / 86_400)
            if random.random() * (1 + self.diurnal) < rate:
                yield at_s
