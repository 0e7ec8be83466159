"""What one look at the swarm saw: announcements, listings, and whether servers answered when they were dialled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from swarm.dht import Announcement, ExpertAnnouncement, ModelListing


@dataclass(frozen=True, slots=True)
class Probe:
    """What came of dialling a server."""

    at: float
    """Unix time."""
    issued_at: float
    """When the announcement known then had been issued, by the server's clock: a later one is a sign of life."""
    rtt_s: float | None = None
    """Seconds of a round trip; None: no answer."""
    refused: bool = False
    """Nobody listens where the server did."""


@dataclass(frozen=True, slots=True)
class Observation:
    """One look."""

    at: float
    """Unix time."""
    spans: tuple[Announcement, ...] = ()
    """Of all models that are watched; also farewells."""
    experts: tuple[ExpertAnnouncement, ...] = ()
    listings: tuple[ModelListing, ...] = ()
    probes: Mapping[str, Probe] = field(default_factory=dict)
    """The latest of each server, by peer id."""
    is_blind: bool = False
    """No other peer of the DHT is in sight: that nothing is found there says nothing."""
