"""What is known of a swarm: its models, its servers and how they are. A value; :func:`advance` makes the next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NamedTuple

from swarm.dht import LEASE_S, Announcement, ExpertAnnouncement, State
from swarm.dht.display_name import name_of
from swarm.dht.expert_announcement import experts_in
from swarm.health.model_facts import ModelFacts, agreed_facts
from swarm.health.observation import Observation, Probe

DEATH_MEMORY_S = 600.0
"""So long a server that died is shown, and its model is degraded unless others have taken its place."""
FAREWELL_MEMORY_S = 120.0
"""So long a server that left is shown."""
MODEL_MEMORY_S = 24 * 3600.0
"""So long a model that nobody hosts any more is shown."""
SILENCE_S = LEASE_S - 4.0
"""A server whose record is gone from the directory, and was new so long ago, has not renewed it: looks are up to 4 s
apart. A record that is gone sooner was lost by others."""
MISSED_PROBES = 2
"""A server that does not answer so many times running cannot be reached."""


class Condition(StrEnum):
    """How a server is."""

    ONLINE = "online"
    JOINING = "joining"
    """It is loading, and will serve soon."""
    DRAINING = "draining"
    """It takes no new session, and will leave."""
    UNREACHABLE = "unreachable"
    """It says that it is online, and does not answer here."""
    DEAD = "dead"
    """It is gone without a farewell: nobody listens at its address, or it no longer renews its announcement."""
    LEFT = "left"
    """It said farewell."""

    @property
    def is_present(self) -> bool:
        return self not in (Condition.DEAD, Condition.LEFT)


class ServerKey(NamedTuple):
    """One record: a peer may have several."""

    model: str
    peer_id: str
    of_experts: bool


@dataclass(frozen=True, slots=True)
class ServerRecord:
    """One server of one model. Times are Unix times by the clock of whoever looks."""

    announcement: Announcement | ExpertAnnouncement
    """The latest."""
    condition: Condition
    since: float
    """When it came into this condition."""
    first_seen: float
    renewed_at: float
    """When this announcement was first seen."""
    probe: Probe | None = None
    answered: bool = False
    """Whether it ever has."""
    missed_probes: int = 0
    """Since it last answered."""
    copies_before: int = 0
    """Of one that died: servers that the worst of its blocks (experts) had before."""

    @property
    def name(self) -> str:
        """What people call it: its public name, or the ends of its peer id."""
        return name_of(self.announcement)

    @property
    def rtt_s(self) -> float | None:
        """Of the last probe, if it was answered."""
        return self.probe.rtt_s if self.probe is not None else None


@dataclass(frozen=True, slots=True)
class SwarmState:
    """Everything that is known, at one time."""

    at: float = 0.0
    """Unix time of the last look; 0: there was none."""
    is_blind: bool = False
    models: Mapping[str, ModelFacts] = field(default_factory=dict)
    """By digest."""
    servers: Mapping[ServerKey, ServerRecord] = field(default_factory=dict)

    def by_model(self) -> dict[str, list[ServerRecord]]:
        """Those of every model, by its digest."""
        found: dict[str, list[ServerRecord]] = {digest: [] for digest in self.models}
        for key, record in self.servers.items():
            found[key.model].append(record)
        return found

    def of_model(self, model: str) -> list[ServerRecord]:
        """Its servers, of blocks and of experts, present or not."""
        return [record for key, record in self.servers.items() if key.model == model]


def advance(before: SwarmState, seen: Observation, asked_for: Mapping[str, ModelFacts]) -> SwarmState:
    """What is known after one more look.

    Args:
        asked_for: models that are shown whether anybody hosts them or not, by digest.
    """
    everybody: list[Announcement | ExpertAnnouncement] = [*seen.spans, *seen.experts]
    said = {ServerKey(one.model, one.peer_id, isinstance(one, ExpertAnnouncement)): one for one in everybody}
    facts = agreed_facts(before.models, asked_for, seen.spans, seen.listings)
    servers = {}
    for key in before.servers.keys() | said.keys():
        known, latest = before.servers.get(key), said.get(key)
        if isinstance(latest, Announcement) and latest.num_blocks != facts[key.model].num_blocks:
            latest = None  # it speaks of some other model
        record = _next(known, latest, seen)
        if record is not None:
            servers[key] = record
    hosted = {key.model for key, record in servers.items() if record.condition.is_present}
    models = {}
    for digest, one in facts.items():
        last_hosted = seen.at if digest in hosted else one.last_hosted
        if digest in asked_for or (last_hosted is not None and seen.at - last_hosted < MODEL_MEMORY_S):
            models[digest] = replace(one, last_hosted=last_hosted)
    servers = {key: record for key, record in servers.items() if key.model in models}
    after = SwarmState(seen.at, seen.is_blind, models, servers)
    return replace(after, servers={key: _with_copies(before, key, one) for key, one in servers.items()})


def _next(
    known: ServerRecord | None, latest: Announcement | ExpertAnnouncement | None, seen: Observation
) -> ServerRecord | None:
    """One server's record after a look; None: there is nothing to be said of it any more."""
    if known is None:
        if latest is None or latest.state is State.OFFLINE:
            return None
        known = ServerRecord(latest, Condition.JOINING, seen.at, seen.at, seen.at)
    is_new = latest is not None and latest.issued_at > known.announcement.issued_at
    if latest is not None and is_new:
        known = replace(known, announcement=latest, renewed_at=seen.at)
    known = _with_probe(known, seen.probes.get(known.announcement.peer_id))
    condition = _condition(known, is_there=latest is not None, is_new=is_new, seen=seen)
    if condition is not known.condition:
        known = replace(known, condition=condition, since=seen.at)
    memory_s = {Condition.DEAD: DEATH_MEMORY_S, Condition.LEFT: FAREWELL_MEMORY_S}.get(condition)
    return None if memory_s is not None and seen.at - known.since > memory_s else known


def _with_probe(known: ServerRecord, probe: Probe | None) -> ServerRecord:
    if probe is None or probe == known.probe:
        return known
    if probe.rtt_s is not None:
        return replace(known, probe=probe, answered=True, missed_probes=0)
    return replace(known, probe=probe, missed_probes=known.missed_probes + 1)


def _condition(known: ServerRecord, *, is_there: bool, is_new: bool, seen: Observation) -> Condition:
    announcement, probe = known.announcement, known.probe
    if announcement.state is State.OFFLINE:
        return Condition.LEFT
    if known.condition is Condition.DEAD and not is_new:
        return Condition.DEAD
    if probe is not None and probe.refused and known.answered and announcement.issued_at <= probe.issued_at:
        return Condition.DEAD
    if not is_there and not seen.is_blind and seen.at - known.renewed_at >= SILENCE_S:
        return Condition.DEAD
    if announcement.state is State.DRAINING:
        return Condition.DRAINING
    if announcement.state is State.JOINING or announcement.tentative:
        return Condition.JOINING
    return Condition.UNREACHABLE if known.missed_probes >= MISSED_PROBES else Condition.ONLINE


def _with_copies(before: SwarmState, key: ServerKey, record: ServerRecord) -> ServerRecord:
    """Of one that has just died, note how many there were for the worst of what it hosted."""
    known = before.servers.get(key)
    if record.condition is not Condition.DEAD or known is None or known.condition is Condition.DEAD:
        return record
    others = (one for other, one in before.servers.items() if other.model == key.model)
    return replace(record, copies_before=fewest_copies(record.announcement, others))


def fewest_copies(hosted: Announcement | ExpertAnnouncement, records: Iterable[ServerRecord]) -> int:
    """How many online servers the worst of what `hosted` names has."""
    online = [one.announcement for one in records if one.condition is Condition.ONLINE]
    if isinstance(hosted, Announcement):
        spans = [one for one in online if isinstance(one, Announcement)]
        return min(sum(one.hosts(block) for one in spans) for block in range(hosted.start, hosted.end))
    bitmaps = [one.bitmaps for one in online if isinstance(one, ExpertAnnouncement)]
    counts = []
    for block, bitmap in hosted.bitmaps.items():
        others = [int.from_bytes(one.get(block, b""), "little") for one in bitmaps]
        counts += [sum(one >> expert & 1 for one in others) for expert in experts_in(bitmap)]
    return min(counts)
