"""What the history tells, joined with what is known now."""

from __future__ import annotations

from swarm.dht.display_name import short_id
from swarm.errors import DiskError
from swarm.health.history import History, Sample
from swarm.health.presenting import Snapshot, incident_view, server_view
from swarm.health.views import HistoryView, ModelHistoryView, SampleView, ServerDetailView

NO_HISTORY = "The history cannot be read now."
_MOST_INCIDENTS = 300
_MOST_SERVER_INCIDENTS = 50


def server_detail(snapshot: Snapshot, history: History, peer_id: str, now: float) -> ServerDetailView | None:
    """One peer; None: it is known neither now nor in the history. A history that cannot be read is left out."""
    hosts = [record for key, record in snapshot.state.servers.items() if key.peer_id == peer_id]
    try:
        past, incidents = history.peer(peer_id), history.incidents(_MOST_SERVER_INCIDENTS, server=peer_id)
    except DiskError:
        past, incidents = None, []
    if not hosts and past is None and not incidents:
        return None
    first = [*(one.first_seen for one in hosts), *([past.first_seen] if past else []), *(one.at for one in incidents)]
    last = [*(now for one in hosts if one.condition.is_present), *([past.last_seen] if past else []), *first]
    seen_s = max(now - min(first), 1.0)
    return ServerDetailView(
        id=peer_id,
        name=hosts[0].name if hosts else (incidents[0].server_name if incidents else short_id(peer_id)),
        hosts=[server_view(one) for one in hosts],
        first_seen=min(first),
        last_seen=max(last),
        online_s=past.online_s if past else 0.0,
        uptime=min(1.0, past.online_s / seen_s) if past else None,
        block_hours=past.block_hours if past else 0.0,
        incidents=[incident_view(one) for one in incidents],
    )


def model_histories(history: History, now: float, hours: float, model: str | None) -> HistoryView:
    """The last `hours` of one model or all. A history that cannot be read is empty, with a note."""
    begin = now - 3600 * hours
    try:
        interval_s, samples = history.samples(begin, now, model)
        incidents = history.incidents(_MOST_INCIDENTS, begin=begin, model=model)
    except DiskError:
        return HistoryView(begin=begin, end=now, interval_s=0, models=[], incidents=[], note=NO_HISTORY)
    by_model: dict[str, list[Sample]] = {}
    for one in samples:
        by_model.setdefault(one.model, []).append(one)
    return HistoryView(
        begin=begin,
        end=now,
        interval_s=interval_s,
        models=[
            ModelHistoryView(model=digest, name=found[-1].name, samples=[_sample_view(one) for one in found])
            for digest, found in by_model.items()
        ],
        incidents=[incident_view(one) for one in incidents],
        note="",
    )


def _sample_view(sample: Sample) -> SampleView:
    return SampleView(
        at=sample.at,
        servers=round(sample.servers, 2),
        survives=round(sample.survives, 2),
        bound_steps_per_s=round(sample.bound_steps_per_s, 3),
        sessions=round(sample.sessions, 2),
        healthy=round(sample.healthy, 4),
        degraded=round(sample.degraded, 4),
        broken=round(sample.broken, 4),
    )
