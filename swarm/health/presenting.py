"""From what is known of a swarm to what the dashboard tells of it. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from swarm.dht import Announcement, ExpertAnnouncement
from swarm.dht.display_name import shown_name
from swarm.health.incidents import Incident
from swarm.health.model_facts import ModelFacts
from swarm.health.swarm_state import Condition, ServerRecord, SwarmState
from swarm.health.verdicts import Health, Verdict
from swarm.health.views import (
    ConnectionView,
    ContributorView,
    ExpertsView,
    IncidentView,
    ModelDetailView,
    ModelsView,
    ModelView,
    OverviewView,
    ServerView,
    StateView,
    TotalsView,
)
from swarm.placement.expert_demand import ExpertDemand


@dataclass(frozen=True)
class Snapshot:
    """All that there is to tell after a look."""

    sequence: int = 0
    state: SwarmState = field(default_factory=SwarmState)
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    """By the model's digest."""
    health_since: Mapping[str, float] = field(default_factory=dict)
    """When each model came to be as it is, Unix time."""
    note: str = "Looking for the swarm…"
    """Why the swarm is not seen; empty if it is."""
    incidents: Sequence[Incident] = ()
    """The latest, newest first."""
    contributors: Sequence[ContributorView] = ()
    history_note: str = ""


def overview(snapshot: Snapshot) -> OverviewView:
    """The first page."""
    state = snapshot.state
    models = model_views(snapshot)
    return OverviewView(
        sequence=snapshot.sequence,
        at=state.at,
        connection=ConnectionView(connected=not snapshot.note, note=snapshot.note),
        headline=headline(models, snapshot.note, is_first_look=state.at == 0),
        totals=TotalsView(
            models={health: sum(one.health is health for one in models) for health in Health},
            servers=_conditions(state.servers.values()),
            sessions=sum(one.sessions for one in models),
        ),
        models=models,
        incidents=[incident_view(one) for one in snapshot.incidents],
        contributors=list(snapshot.contributors),
        history_note=snapshot.history_note,
    )


def everything(snapshot: Snapshot) -> StateView:
    """The first page and all servers."""
    servers = sorted(snapshot.state.servers.values(), key=_place)
    return StateView(**dict(overview(snapshot)), servers=[server_view(one) for one in servers])


def models_view(snapshot: Snapshot) -> ModelsView:
    """All models."""
    return ModelsView(at=snapshot.state.at, models=model_views(snapshot))


def model_views(snapshot: Snapshot) -> list[ModelView]:
    """The worst first, then by name."""
    by_model = snapshot.state.by_model()
    views = [
        _model_view(facts, snapshot.verdicts[digest], by_model[digest], snapshot.health_since[digest])
        for digest, facts in snapshot.state.models.items()
    ]
    return sorted(views, key=lambda one: (-one.health.severity, one.name, one.id))


def health_of(snapshot: Snapshot, model: str) -> tuple[str, Health] | None:
    """Name and health of a model, by its digest or name; of several with that name, the worst. None: there is none."""
    found = [
        (facts.name, snapshot.verdicts[digest].health)
        for digest, facts in snapshot.state.models.items()
        if model in (digest, facts.name)
    ]
    return max(found, key=lambda one: one[1].severity, default=None)


def model_detail(snapshot: Snapshot, model: str) -> ModelDetailView | None:
    """One model, by its digest; None: it is not watched."""
    facts = snapshot.state.models.get(model)
    if facts is None:
        return None
    records = sorted(snapshot.state.of_model(model), key=_place)
    verdict = snapshot.verdicts[model]
    return ModelDetailView(
        at=snapshot.state.at,
        model=_model_view(facts, verdict, records, snapshot.health_since[model]),
        servers=[server_view(one) for one in records],
        expert_copies={block: counts.tolist() for block, counts in sorted(verdict.coverage.expert_copies.items())},
        expert_shares=_expert_shares(facts, records),
    )


def _expert_shares(facts: ModelFacts, records: Iterable[ServerRecord]) -> dict[int, list[float]]:
    told = (
        record.announcement.tokens_lately
        for record in records
        if record.condition.is_present and isinstance(record.announcement, ExpertAnnouncement)
    )
    demand = ExpertDemand.told(told, facts.experts)
    return {
        block: [round(share, 6) for share in demand.shares(block, facts.experts[block]).tolist()]
        for block in sorted(demand.chosen)
    }


def server_view(record: ServerRecord) -> ServerView:
    """One server of one model."""
    said = record.announcement
    start: int | None = None
    end: int | None = None
    free: int | None = None
    steps: float | None = None
    rows: float | None = None
    experts: dict[int, int] = {}
    if isinstance(said, Announcement):
        start, end, free, moves = said.start, said.end, said.free_kv_tokens, said.moves
        precision, steps, sessions = said.precision, said.throughput, said.sessions
    else:
        experts = {block: sum(byte.bit_count() for byte in bitmap) for block, bitmap in sorted(said.bitmaps.items())}
        precision, rows, sessions, moves = said.dtype, said.rows_per_s, said.calls_under_way, 0
    return ServerView.model_construct(  # checked already: strangers' fields by the announcement's schema
        id=said.peer_id,
        model=said.model,
        name=record.name,
        is_named=bool(shown_name(said.public_name)),
        condition=record.condition,
        since=record.since,
        seen_since=record.first_seen,
        start=start,
        end=end,
        loaded=said.loaded if isinstance(said, Announcement) else None,
        experts=experts,
        precision=_one_line(precision),
        steps_per_s=steps,
        rows_per_s=rows,
        sessions=sessions,
        free_kv_tokens=free,
        moves=moves,
        version=_one_line(said.version),
        latency_ms=round(1000 * record.rtt_s, 2) if record.rtt_s is not None else None,
    )


def incident_view(incident: Incident) -> IncidentView:
    """As the API tells it."""
    return IncidentView(
        at=incident.at,
        kind=incident.kind,
        model=incident.model,
        model_name=incident.model_name,
        server=incident.server,
        server_name=incident.server_name,
        text=incident.text,
    )


def headline(models: Sequence[ModelView], note: str, *, is_first_look: bool) -> str:
    """The whole swarm in a sentence."""
    if note:
        return "The swarm cannot be reached from here." if not is_first_look else "Looking for the swarm…"
    if not models:
        return "Nobody hosts a model here yet."
    worst = [one for one in models if one.health is models[0].health]
    if models[0].health is Health.HEALTHY:
        if len(models) == 1:
            return f"{models[0].name} is healthy."
        return f"{'Both' if len(models) == 2 else f'All {len(models)}'} models are healthy."
    others = sum(one.health is not Health.HEALTHY for one in models) - len(worst)
    more = f", {others} more degraded" if others else ""
    if len(worst) == 1:
        return f"{worst[0].name} is {worst[0].health}{more}."
    return f"{len(worst)} of {len(models)} models are {models[0].health}{more}."


def _model_view(facts: ModelFacts, verdict: Verdict, records: Sequence[ServerRecord], since: float) -> ModelView:
    coverage = verdict.coverage
    present = [one.announcement for one in records if one.condition.is_present]
    precisions = Counter(_one_line(one.precision) for one in present if isinstance(one, Announcement))
    counts = coverage.expert_copies
    experts = None
    if counts and any(isinstance(one, ExpertAnnouncement) or one.kept_experts for one in present):
        experts = ExpertsView(
            blocks=len(counts),
            experts=sum(map(len, counts.values())),
            fewest_copies=min(int(one.min()) for one in counts.values()),
            missing=sum(map(len, coverage.missing_experts.values())),
        )
    return ModelView(
        id=facts.digest,
        name=facts.name,
        num_blocks=facts.num_blocks,
        health=verdict.health,
        reason=verdict.reason,
        since=since,
        survives=coverage.survives,
        copies=coverage.copies.tolist(),
        bound_steps_per_s=round(verdict.bound_steps_per_s, 3),
        sessions=verdict.sessions,
        servers=_conditions(records),
        precisions=dict(sorted(precisions.items())),
        experts=experts,
    )


def _conditions(records: Iterable[ServerRecord]) -> dict[Condition, int]:
    counts = Counter(one.condition for one in records)
    return {condition: counts[condition] for condition in Condition}


def _place(record: ServerRecord) -> tuple[int, int, str]:
    said = record.announcement
    if isinstance(said, Announcement):
        return said.start, said.end, said.peer_id
    return 1_000_000, min(said.bitmaps), said.peer_id


def _one_line(text: str) -> str:
    return "".join(letter for letter in text if letter.isprintable())
