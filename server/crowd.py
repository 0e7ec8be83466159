"""When those for whom a server has no room should ask again: the later, the more of them there are."""

from __future__ import annotations

from collections import deque

_AT_LEAST_S = 1.0
_WINDOW_S = 10.0
_IN_WINDOW = 20.0
"""Refusals in the window that are no burden. When n clients do as they are told, there are √(200 n) in it."""


class Crowd:
    """Counts refusals; for a clock of the caller's."""

    def __init__(self) -> None:
        self._refused: deque[float] = deque()

    def retry_after_s(self, now: float) -> float:
        """One more is turned away; how long it should wait before it asks again."""
        while self._refused and self._refused[0] <= now - _WINDOW_S:
            self._refused.popleft()
        self._refused.append(now)
        return max(_AT_LEAST_S, len(self._refused) / _IN_WINDOW)
