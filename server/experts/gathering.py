"""Decide whom to ask for experts, whom besides if an answer is late, and whom instead of one that failed. Pure."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from swarm.routing.experts import ExpertChoice, assign_experts

_SAMPLES = 64
_LATE_QUANTILE = 0.95
_LATE_TIMES = 2.0
_LATE_AT_LEAST_S = 0.05
_LATE_UNKNOWN_S = 1.0
_FEW_ROWS = 64
_PATIENCE = 2.0
"""Rather than one server that takes more than so many times as long as others, several are asked."""


@dataclass(eq=False)
class Ask:
    """Something that one server was asked for."""

    peer_id: str
    experts: frozenset[int]


class Gathering:
    """One block's experts for some tokens."""

    def __init__(self, needed: Collection[int]) -> None:
        self._missing = set(needed)
        self._asks: set[Ask] = set()

    @property
    def is_complete(self) -> bool:
        """Everything has come."""
        return not self._missing

    @property
    def hopeless(self) -> frozenset[int]:
        """Experts that have not come, and for which nobody is being asked."""
        return frozenset(self._missing.difference(*(ask.experts for ask in self._asks)))

    def ask(self, hosts: Sequence[ExpertChoice]) -> list[Ask]:
        """Whom to ask for what nobody is being asked for."""
        return self._begin(assign_experts(self.hopeless, hosts, patience=_PATIENCE).by_peer)

    def answered(self, ask: Ask) -> frozenset[int]:
        """An answer has come; what of it was still missing."""
        self._asks.discard(ask)
        new = ask.experts & self._missing
        self._missing -= new
        return new

    def failed(self, ask: Ask) -> None:
        """No answer will come."""
        self._asks.discard(ask)

    def late(self, ask: Ask, hosts: Sequence[ExpertChoice]) -> list[Ask]:
        """Whom to ask besides, since an answer is late: others, for what of it is still missing. Each once."""
        if ask not in self._asks:
            return []
        asked = {one.peer_id for one in self._asks if one.experts & ask.experts}
        others = [host for host in hosts if host.peer_id not in asked]
        return self._begin(assign_experts(ask.experts & self._missing, others, patience=_PATIENCE).by_peer)

    def _begin(self, assigned: dict[str, frozenset[int]]) -> list[Ask]:
        asks = [Ask(peer_id, experts) for peer_id, experts in assigned.items()]
        self._asks.update(asks)
        return asks


@dataclass
class Latencies:
    """How long a server takes to answer, as its last answers showed."""

    _few: deque[float] = field(default_factory=lambda: deque(maxlen=_SAMPLES))
    _many: deque[float] = field(default_factory=lambda: deque(maxlen=_SAMPLES))

    def add(self, rows: int, seconds: float) -> None:
        """An answer to a call of so many rows took so long."""
        (self._few if rows <= _FEW_ROWS else self._many).append(seconds)

    @property
    def usual_s(self) -> float:
        """For a few rows; 0 if it has not answered yet: who is new is tried."""
        return sorted(self._few)[len(self._few) // 2] if self._few else 0.0

    def late_after_s(self, rows: int) -> float:
        """When to ask somebody else besides."""
        samples = self._few if rows <= _FEW_ROWS else self._many
        if not samples:
            return _LATE_UNKNOWN_S
        quantile = sorted(samples)[math.ceil(_LATE_QUANTILE * len(samples)) - 1]
        return max(_LATE_AT_LEAST_S, _LATE_TIMES * quantile)
