"""Decide when to ask a silent peer for a sign of life, and when to give it up. Pure: the caller brings the clock."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Heartbeat:
    """One connection's silence, measured.

    A raw libp2p stream reports a killed peer at once, but a frozen one only after 40 s (measured), hence this.
    """

    interval_s: float
    """Ask after this much silence."""
    timeout_s: float
    """Give up after this much silence, counted from the first question that was not answered."""
    _last_heard: float = 0.0
    _asked_at: float | None = None
    _asked_again_at: float = 0.0

    def heard(self, now: float) -> None:
        """Something arrived."""
        self._last_heard, self._asked_at = now, None

    def should_ask(self, now: float) -> bool:
        """Whether to send a ping now; remembers that it was sent."""
        quiet_since = self._last_heard if self._asked_at is None else self._asked_again_at
        if now - quiet_since < self.interval_s:
            return False
        if self._asked_at is None:
            self._asked_at = now
        self._asked_again_at = now
        return True

    def is_dead(self, now: float) -> bool:
        """Whether the peer has left a question unanswered for too long."""
        return self._asked_at is not None and now - self._asked_at >= self.timeout_s
