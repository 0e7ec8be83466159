"""What has happened between two looks, as sentences with times. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from swarm.dht import Announcement, ExpertAnnouncement
from swarm.health.swarm_state import Condition, ServerRecord, SwarmState
from swarm.health.verdicts import Health, Verdict, name_blocks
from swarm.number_runs import runs


class Kind(StrEnum):
    """Of an incident."""

    SERVER_APPEARED = "server_appeared"
    SERVER_RETURNED = "server_returned"
    SERVER_LEFT = "server_left"
    SERVER_DIED = "server_died"
    SERVER_MOVED = "server_moved"
    MODEL_FOUND = "model_found"
    MODEL_HEALTHY = "model_healthy"
    MODEL_DEGRADED = "model_degraded"
    MODEL_BROKEN = "model_broken"


@dataclass(frozen=True)
class Incident:
    """One thing that happened."""

    at: float
    """Unix time at which it was noticed."""
    kind: Kind
    model: str
    """Digest."""
    model_name: str
    server: str
    """Peer id; empty if it is about the whole model."""
    server_name: str
    text: str
    """A sentence."""


_MODEL_KINDS = {
    Health.HEALTHY: Kind.MODEL_HEALTHY,
    Health.DEGRADED: Kind.MODEL_DEGRADED,
    Health.BROKEN: Kind.MODEL_BROKEN,
}


def incidents_between(
    before: SwarmState,
    verdicts_before: Mapping[str, Verdict],
    after: SwarmState,
    verdicts_after: Mapping[str, Verdict],
) -> list[Incident]:
    """What happened, servers first, then what it made of their models.

    Of a model that was not known before, the servers are no news: it was found with them.
    """
    incidents = []
    for key, record in after.servers.items():
        if key.model not in before.models:
            continue
        news = _server_news(before.servers.get(key), record)
        if news is not None:
            kind, text = news
            name = after.models[key.model].name
            incidents.append(Incident(after.at, kind, key.model, name, key.peer_id, record.name, text))
    incidents.sort(key=lambda one: (one.model, one.kind, one.server))
    for digest, facts in after.models.items():
        verdict, old = verdicts_after[digest], verdicts_before.get(digest)
        if old is None:
            kind, text = Kind.MODEL_FOUND, f"{facts.name} is watched: {verdict.health}. {verdict.reason}"
        elif old.health is not verdict.health:
            kind, text = _MODEL_KINDS[verdict.health], f"{facts.name} is {verdict.health}. {verdict.reason}"
        else:
            continue
        incidents.append(Incident(after.at, kind, digest, facts.name, "", "", text))
    return incidents


def hosted_text(hosted: Announcement | ExpertAnnouncement) -> str:
    """What a server hosts, for people."""
    if isinstance(hosted, Announcement):
        return name_blocks(range(hosted.start, hosted.end))
    count = sum(map(len, hosted.experts.values()))
    blocks = sorted(hosted.bitmaps)
    return f"{count} expert{'s' if count > 1 else ''} of {name_blocks(blocks) if len(runs(blocks)) < 3 else 'blocks'}"


def _is_focus(old: Announcement | ExpertAnnouncement, new: Announcement | ExpertAnnouncement) -> bool:
    """Whether what is hosted can only be another part of the same: nobody need take notice."""
    return isinstance(old, Announcement) and isinstance(new, Announcement) and old.in_memory == new.in_memory


def _server_news(old: ServerRecord | None, new: ServerRecord) -> tuple[Kind, str] | None:
    hosted = hosted_text(new.announcement)
    if old is None:
        return Kind.SERVER_APPEARED, f"{new.name} appeared with {hosted}."
    if old.condition is not new.condition:
        if new.condition is Condition.DEAD:
            return Kind.SERVER_DIED, f"{new.name} died, with {hosted}."
        if new.condition is Condition.LEFT:
            return Kind.SERVER_LEFT, f"{new.name} left politely, with {hosted}."
        if not old.condition.is_present:
            return Kind.SERVER_RETURNED, f"{new.name} is back with {hosted}."
    was = hosted_text(old.announcement)
    if _is_focus(old.announcement, new.announcement):
        return None
    if was != hosted and new.condition.is_present:
        return Kind.SERVER_MOVED, f"{new.name} moved from {was} to {hosted}."
    return None
