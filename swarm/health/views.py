"""What the dashboard tells: the JSON of its API. No address and no location of anybody is in it."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from swarm.health.incidents import Kind
from swarm.health.swarm_state import Condition
from swarm.health.verdicts import Health

UnixTime = Annotated[float, Field(description="Unix time in seconds")]
Digest = Annotated[str, Field(description="The digest that names a model: 64 hexadecimal digits")]


class View(BaseModel):
    """What all have in common."""

    model_config = ConfigDict(frozen=True)


class ConnectionView(View):
    """Whether the dashboard sees the swarm."""

    connected: bool
    note: str = Field(description="A sentence; empty if all is well")


class ExpertsView(View):
    """Routed experts of a model whose experts are hosted apart from their blocks."""

    blocks: int = Field(description="Blocks that have routed experts")
    experts: int = Field(description="In all")
    fewest_copies: int = Field(description="Servers of experts that the worst expert has")
    missing: int = Field(description="Experts that nobody hosts, and some server needs")


class ModelView(View):
    """One model."""

    id: Digest
    name: str
    num_blocks: int
    health: Health
    reason: str = Field(description="Why, in a sentence")
    since: UnixTime = Field(description="When it came to be so, or when it was first seen")
    survives: int | None = Field(
        description="Redundancy: so many servers, whichever they are, can die at once without uncovering a block or "
        "expert; null if some block has no server now"
    )
    copies: list[int] = Field(description="By block: servers that are online and answer")
    bound_steps_per_s: float = Field(
        description="Decode steps per second that no placement of these servers could exceed: Σ throughput · blocks / L"
    )
    sessions: int
    servers: dict[Condition, int] = Field(description="How many servers are in each condition")
    precisions: dict[str, int] = Field(description="How many servers compute in each precision")
    experts: ExpertsView | None


class ServerView(View):
    """One server of one model."""

    id: str = Field(description="Peer id")
    model: Digest
    name: str = Field(description="The name that its owner chose, else the ends of its peer id")
    is_named: bool = Field(description="Whether the owner chose a name")
    condition: Condition
    since: UnixTime
    seen_since: UnixTime = Field(description="When this dashboard first saw it, since it was last forgotten")
    start: int | None = Field(description="It hosts the blocks [start, end); null for a server of experts")
    end: int | None
    loaded: tuple[int, int] | None = Field(description="All blocks in its memory, if they are more")
    experts: dict[int, int] = Field(description="Of a server of experts: how many it hosts, by block")
    precision: str
    steps_per_s: float | None = Field(description="Through its whole span, one sequence; by its own measurement")
    rows_per_s: float | None = Field(description="Of a server of experts: single experts a second")
    sessions: int = Field(description="Under way; of a server of experts: calls")
    free_kv_tokens: int | None = Field(description="Positions of KV cache that are free")
    moves: int
    version: str
    latency_ms: float | None = Field(description="Of a round trip from the dashboard; null: it did not answer")


class IncidentView(View):
    """Something that happened."""

    at: UnixTime
    kind: Kind
    model: Digest
    model_name: str
    server: str = Field(description="Peer id; empty if it is about the whole model")
    server_name: str
    text: str


class ContributorView(View):
    """Somebody who donates, by the name that they chose; names are what people call themselves."""

    name: str
    is_named: bool
    servers: int = Field(description="Peer ids that went by this name")
    block_hours: float = Field(description="Blocks hosted, times hours, within 30 days")


class TotalsView(View):
    """Of everything that is watched."""

    models: dict[Health, int]
    servers: dict[Condition, int]
    sessions: int


class OverviewView(View):
    """The first page."""

    sequence: int = Field(description="Grows with every look at the swarm")
    at: UnixTime = Field(description="Of the last look; 0: there was none yet")
    connection: ConnectionView
    headline: str
    totals: TotalsView
    models: list[ModelView]
    incidents: list[IncidentView] = Field(description="The latest, newest first")
    contributors: list[ContributorView] = Field(description="Those who donated most")
    history_note: str = Field(description="Why no history is kept, if it is not")


class StateView(OverviewView):
    """Everything that is known now."""

    servers: list[ServerView]


class ModelsView(View):
    """All models that are watched."""

    at: UnixTime
    models: list[ModelView]


class ModelDetailView(View):
    """One model with its servers."""

    at: UnixTime
    model: ModelView
    servers: list[ServerView]
    expert_copies: dict[int, list[int]] = Field(description="By block: how many servers of experts host each expert")
    expert_shares: dict[int, list[float]] = Field(
        description="By block from whose experts something was asked lately: each one's share of it"
    )


class ServerDetailView(View):
    """One peer: what it hosts, and how long it has been seen."""

    id: str
    name: str
    hosts: list[ServerView] = Field(description="What it hosts now, or did until it went")
    first_seen: UnixTime
    last_seen: UnixTime
    online_s: float = Field(description="Seconds it was online while this dashboard looked")
    uptime: float | None = Field(description="Share of the time since it was first seen, 0 to 1")
    block_hours: float = Field(description="Blocks hosted, times hours, within 30 days")
    incidents: list[IncidentView]


class SampleView(View):
    """A model during one interval of its history; averages, unless said otherwise."""

    at: UnixTime = Field(description="Begin of the interval")
    servers: float
    survives: float = Field(description="Redundancy; -1 while some block had no server")
    bound_steps_per_s: float
    sessions: float
    healthy: float = Field(description="Share of what was seen of the interval, 0 to 1")
    degraded: float
    broken: float


class ModelHistoryView(View):
    """One model's past."""

    model: Digest
    name: str
    samples: list[SampleView]


class HistoryView(View):
    """The past of all models, at one resolution."""

    begin: UnixTime
    end: UnixTime
    interval_s: int = Field(description="Seconds that a sample stands for")
    models: list[ModelHistoryView]
    incidents: list[IncidentView]
    note: str = Field(description="Why no history is kept, if it is not")
