"""What servers host, and what one could host: the values that placement decides on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

Span = tuple[int, int]
"""Blocks ``[start, end)``."""


class _Blocks:
    """What has a beginning and an end."""

    start: int
    end: int

    @property
    def span(self) -> Span:
        return self.start, self.end

    @property
    def length(self) -> int:
        """How many blocks they are."""
        return self.end - self.start


@dataclass(frozen=True)
class Hosting(_Blocks):
    """What one server hosts, or is loading, as others see it."""

    peer_id: str
    start: int
    end: int
    steps_per_s: float
    """Decode steps per second through its whole span; 0: unknown."""
    is_draining: bool = False
    """It will be gone soon, and counts for nothing."""
    rtts_s: Mapping[str, float] = field(default_factory=dict)
    """Seconds of a round trip to other servers, by peer id."""


@dataclass(frozen=True)
class Capacity:
    """What a server could host."""

    max_blocks: int
    """So many fit in its memory."""
    block_steps_per_s: float = 0.0
    """Decode steps per second through one block; 0: unknown."""
    network_steps_per_s: float = math.inf
    """Steps whose hidden states its network bears."""

    def steps_per_s(self, blocks: int) -> float:
        """Decode steps per second through a span of so many blocks."""
        return min(self.block_steps_per_s / max(blocks, 1), self.network_steps_per_s)


@dataclass(frozen=True)
class Loaded(_Blocks):
    """What a server has in memory: it may host any part of it, and another part a moment later."""

    start: int
    end: int
    capacity: Capacity
