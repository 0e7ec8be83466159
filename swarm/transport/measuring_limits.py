"""Decide whom to let measure the way to us, and how often. Pure: the caller brings the clock.

A measurement costs at most :data:`MAX_TRANSFER_BYTES` in each direction. Whatever strangers ask, and however many names
they have, a server spends no more on it than :data:`BURST` measurements at once, and then one every :data:`REFILL_S`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MAX_TRANSFER_BYTES = 1024**2
"""In each direction, of one measurement."""
PEER_INTERVAL_S = 60.0
"""A peer is let in once in this time. It is longer than a measurement may last, so a peer has one at a time."""
BURST = 8
REFILL_S = 30.0
AT_ONCE = 2
"""More beside each other would show less than there is."""


@dataclass
class MeasuringLimits:
    """Who was let in, and when."""

    _allowance: float = BURST
    _refilled_at: float = 0.0
    _running: int = 0
    _let_in_at: dict[str, float] = field(default_factory=dict)
    """In the last `PEER_INTERVAL_S`; the allowance keeps it short."""

    def begin(self, peer_id: str, now: float) -> bool:
        """Whether a peer may measure now; if so, :meth:`end` must follow."""
        self._allowance = min(BURST, self._allowance + (now - self._refilled_at) / REFILL_S)
        self._refilled_at = now
        self._let_in_at = {peer: at for peer, at in self._let_in_at.items() if now - at < PEER_INTERVAL_S}
        if peer_id in self._let_in_at or self._running >= AT_ONCE or self._allowance < 1:
            return False
        self._allowance -= 1
        self._running += 1
        self._let_in_at[peer_id] = now
        return True

    def end(self) -> None:
        """A measurement is over."""
        self._running -= 1
