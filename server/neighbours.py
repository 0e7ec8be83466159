"""Decide to whom a server should know its way, and what it may say of its network then. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from swarm.dht import Announcement, State
from swarm.dht.announcement import MAX_RTTS
from swarm.transport.measuring import MeasuredLink


@dataclass(frozen=True)
class NetworkSpeed:
    """What a server's measurements amount to."""

    rtts_s: Mapping[str, float] = field(default_factory=dict)
    """Round trips by peer id, those to likely successors first."""
    upload_bytes_per_s: float | None = None
    """To the peer that took most."""
    download_bytes_per_s: float | None = None


def likely_neighbours(peer_id: str, start: int, end: int, servers: Iterable[Announcement]) -> list[Announcement]:
    """The servers with which one that hosts ``[start, end)`` is likely to share sessions, likeliest first.

    Those to which it would send on come first, then those from which it would get, then all others. Among equals
    everybody has an order of its own, lest all measure the same few.
    """

    def rank(server: Announcement) -> tuple[int, bytes]:
        if server.hosts(end):
            kind = 0 if server.start == end else 1
        elif start > 0 and server.hosts(start - 1):
            kind = 2 if server.end == start else 3
        else:
            kind = 4
        return kind, hashlib.sha256(f"{peer_id} {server.peer_id}".encode()).digest()

    there = [one for one in servers if one.peer_id != peer_id and one.state is State.ONLINE]
    return sorted(there, key=rank)[:MAX_RTTS]


def latest(before: MeasuredLink | None, now: MeasuredLink | None) -> MeasuredLink | None:
    """What is known of a link: what could not be measured this time is taken to be as it was."""
    if before is None or now is None:
        return now or before
    return MeasuredLink(
        now.round_trip_s,
        now.upload_bytes_per_s or before.upload_bytes_per_s,
        now.download_bytes_per_s or before.download_bytes_per_s,
    )


def summarize(neighbours: Sequence[str], measured: Mapping[str, MeasuredLink]) -> NetworkSpeed:
    """What is to be announced of the links to `neighbours` (peer ids, likeliest first).

    A transfer shows the slower of two ends, so the fastest says most about this one.
    """
    links = {peer_id: measured[peer_id] for peer_id in neighbours if peer_id in measured}
    uploads = [link.upload_bytes_per_s for link in links.values() if link.upload_bytes_per_s is not None]
    downloads = [link.download_bytes_per_s for link in links.values() if link.download_bytes_per_s is not None]
    return NetworkSpeed(
        {peer_id: link.round_trip_s for peer_id, link in links.items()},
        max(uploads, default=None),
        max(downloads, default=None),
    )
