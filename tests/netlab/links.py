"""What a link does to packets: when, if at all, each one arrives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Link:
    """One direction of a link between two hosts. The default is as good as the machine can do."""

    delay_s: float = 0.0
    """One way, on top of the time on the wire."""
    jitter_s: float = 0.0
    """The delay varies evenly by up to so much in both directions; packets keep their order, as in a queue."""
    bandwidth_bps: float = math.inf
    """Bits per second of IP packets."""
    queue_s: float = 0.1
    """Packets that would wait longer than this for the wire are dropped. A queue of 0 still takes what finds the
    wire free."""
    loss: float = 0.0
    """Share of the packets that vanish."""

    def __post_init__(self) -> None:
        if not 0 <= self.loss <= 1:
            raise ValueError(f"A link cannot lose a share of {self.loss}; loss is between 0 and 1.")
        if self.bandwidth_bps <= 0 or min(self.delay_s, self.jitter_s, self.queue_s) < 0:
            raise ValueError(f"{self}: the bandwidth must be above 0, and no time may be negative.")


class Wire:
    """A link in use: it knows until when it is busy. It has no clock and no socket."""

    def __init__(self, link: Link, random: Random) -> None:
        self.link = link
        self.is_cut = False
        self._random = random
        self._free_at_s = 0.0
        self._last_arrival_s = 0.0

    def arrival_s(self, size_bytes: int, now_s: float) -> float | None:
        """When a packet that is sent now arrives, or None if there is no room for it in the queue."""
        link = self.link
        if self._free_at_s - now_s > link.queue_s:
            return None
        self._free_at_s = max(now_s, self._free_at_s) + size_bytes * 8 / link.bandwidth_bps
        arrival_s = self._free_at_s + link.delay_s
        if link.jitter_s:
            arrival_s += self._random.uniform(-link.jitter_s, link.jitter_s)
        self._last_arrival_s = max(arrival_s, now_s, self._last_arrival_s)
        return self._last_arrival_s

    def lost(self, packets: int) -> list[int]:
        """Which of so many packets vanish."""
        loss = self.link.loss
        return [index for index in range(packets) if self._random.random() < loss] if loss else []
