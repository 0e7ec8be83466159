"""Decide when to ask a silent peer for a sign of life, and when to give it up. Pure: the caller brings the clock."""

from __future__ import annotations

from dataclasses import dataclass

_NEW_SHARE = 0.25
_PATIENCE_ROUND_TRIPS = 4


@dataclass
class Heartbeat:
    """One connection's silence, measured.

    A raw libp2p stream reports a killed peer at once, but a frozen one only after 40 s (measured), hence this.
    """

    interval_s: float
    """Ask after this much silence."""
    timeout_s: float
    """Give up after this much silence, counted from the first question that was not answered; a link on which
    answers take long is given some round trips more."""
    round_trip_s: float | None = None
    """How long answers take, smoothed."""
    _last_heard: float = 0.0
    _asked_at: float | None = None
    _asked_again_at: float = 0.0

    def heard(self, now: float) -> None:
        """Something arrived."""
        self._last_heard, self._asked_at = now, None

    def answered(self, now: float) -> None:
        """The answer to a question arrived."""
        if self._asked_at is not None and self._asked_at == self._asked_again_at:
            sample = now - self._asked_at
            last = self.round_trip_s
            self.round_trip_s = sample if last is None else last + _NEW_SHARE * (sample - last)
        self.heard(now)

    def should_ask(self, now: float) -> bool:
        """Whether to send a ping now; remembers that it was sent."""
        quiet_since = self._last_heard if self._asked_at is None else self._asked_again_at
        if now - quiet_since < self.interval_s:
            return False
        self.asked(now)
        return True

    def asked(self, now: float) -> None:
        """A ping was sent."""
        if self._asked_at is None:
            self._asked_at = now
        self._asked_again_at = now

    def is_dead(self, now: float) -> bool:
        """Whether the peer has left a question unanswered for too long."""
        patience_s = self.timeout_s + _PATIENCE_ROUND_TRIPS * (self.round_trip_s or 0.0)
        return self._asked_at is not None and now - self._asked_at >= patience_s
