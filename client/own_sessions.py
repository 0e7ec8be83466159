"""This client's own sessions on each server: what it knows of a server's load before the server announces it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class _Stay:
    opened_at: float
    """Unix time, to compare with announcements."""
    since: float
    """``time.monotonic()``."""
    closed_at: float | None = None


class OwnSessions:
    """Who of this client is where; times are given."""

    def __init__(self) -> None:
        self._stays: dict[str, dict[str, _Stay]] = {}

    def opened(self, peer_id: str, session: str, wall_clock: float, now: float) -> None:
        """A session (any name) goes to a server."""
        self._stays.setdefault(peer_id, {})[session] = _Stay(wall_clock, now)

    def closed(self, peer_id: str, session: str, wall_clock: float) -> None:
        """It has left it."""
        if (stay := self._stays.get(peer_id, {}).get(session)) is not None:
            stay.closed_at = wall_clock

    def since(self, peer_id: str, session: str) -> float | None:
        """When a session came to a server (``time.monotonic()``); None: it is not there."""
        stay = self._stays.get(peer_id, {}).get(session)
        return stay.since if stay is not None and stay.closed_at is None else None

    def load(self, peer_id: str, announced: int, issued_at: float, but_for: str) -> int:
        """Sessions on a server: the others' as it announced them at `issued_at`, and this client's as they are now.

        Args:
            but_for: a session that does not count: it is the one that looks for a way.
        """
        stays = self._stays.get(peer_id, {})
        for session, stay in list(stays.items()):
            if stay.closed_at is not None and stay.closed_at < issued_at:
                del stays[session]
        counted = sum(stay.opened_at < issued_at for stay in stays.values())
        here = sum(stay.closed_at is None and session != but_for for session, stay in stays.items())
        return max(0, announced - counted) + here
