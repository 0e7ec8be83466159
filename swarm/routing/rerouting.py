"""Whether a session that runs well should change to a way that has become much better."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ReroutePolicy:
    """When a change is worth it."""

    least_ratio: float = 1.5
    """The present way must take so many times as long for what remains: announcements are old, estimates are rough."""
    replay_margin: float = 2.0
    """And the gain must be so many times what the replay costs."""


_USUAL = ReroutePolicy()


def worth_rerouting(present_s: float, best_s: float, replay_s: float, policy: ReroutePolicy = _USUAL) -> bool:
    """Whether to leave a route.

    Args:
        present_s: what the rest of the session is expected to take on it.
        best_s: the same on the best route, without the replay.
        replay_s: what telling the new servers everything is expected to take.
    """
    return present_s > policy.least_ratio * best_s and present_s - best_s > policy.replay_margin * replay_s
