"""Find the fastest way through blocks ``[start, end)`` over the spans that servers host."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

HOP_S = 0.005
"""What a change of server is reckoned to cost, in seconds per step, as long as latencies are not measured."""
_SLOWEST_BLOCK_S = 1e6


@dataclass(frozen=True)
class HostedSpan:
    """What routing needs to know of one server."""

    peer_id: str
    start: int
    end: int
    steps_per_s: float
    """Decode steps per second through its whole span; 0 if unknown."""

    @property
    def block_s(self) -> float:
        """Seconds per step and block; an unknown server is reckoned slow, not impossible."""
        if not self.steps_per_s > 0:
            return 1.0
        return min(1 / (self.steps_per_s * (self.end - self.start)), _SLOWEST_BLOCK_S)  # finite: slow, not impossible


@dataclass(frozen=True)
class Leg:
    """Blocks ``[start, end)``, to be run by one server."""

    peer_id: str
    start: int
    end: int


def find_route(spans: Sequence[HostedSpan], start: int, end: int, *, salt: str = "") -> tuple[Leg, ...] | None:
    """The legs through ``[start, end)`` with the least time per step, or None if a block has no server.

    Dynamic programming from the last block to the first over (block, server); exact in
    O(blocks × servers). A server may be left before its span ends, and joined after its span begins.

    Args:
        salt: breaks ties between equally fast servers, so that different sessions choose differently.
    """
    ordered = sorted(spans, key=lambda span: hashlib.sha256(f"{salt} {span.peer_id}".encode()).digest())
    cost_from: list[float] = [math.inf] * (end + 1)  # of the best way from block b to the end, joining anybody
    cost_from[end] = 0.0
    best_at: dict[int, HostedSpan] = {}
    staying: dict[str, float] = {}  # cost from block b on, being at this server already
    leaves_after: dict[tuple[str, int], bool] = {}
    for block in range(end - 1, start - 1, -1):
        staying_here: dict[str, float] = {}
        for span in ordered:
            if not span.start <= block < span.end:
                continue
            stay, leave = staying.get(span.peer_id, math.inf), cost_from[block + 1]
            leaves_after[span.peer_id, block] = leave < stay
            staying_here[span.peer_id] = span.block_s + min(stay, leave)
            if HOP_S + staying_here[span.peer_id] < cost_from[block]:
                cost_from[block], best_at[block] = HOP_S + staying_here[span.peer_id], span
        staying = staying_here
    if math.isinf(cost_from[start]):
        return None
    legs, block = [], start
    while block < end:
        peer_id, first = best_at[block].peer_id, block
        while not leaves_after[peer_id, block]:
            block += 1
        block += 1
        legs.append(Leg(peer_id, first, block))
    return tuple(legs)


def uncovered_blocks(spans: Sequence[HostedSpan], start: int, end: int) -> list[int]:
    """The blocks of ``[start, end)`` that no span hosts."""
    return [block for block in range(start, end) if not any(span.start <= block < span.end for span in spans)]
