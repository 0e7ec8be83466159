"""The swarm's figures for Prometheus. Pure."""

from __future__ import annotations

from swarm.health.swarm_state import Condition
from swarm.health.verdicts import Health
from swarm.health.views import ModelView, OverviewView
from swarm.prometheus_text import Samples, metric


def metrics_text(overview: OverviewView) -> str:
    """Everything, as text."""
    models = overview.models
    connected: Samples = [({}, float(overview.connection.connected))]
    lines = [
        *_gauge("swarm_health_connected", "Whether the dashboard sees the swarm.", connected),
        *_gauge("swarm_health_last_look_timestamp_seconds", "Unix time of the last look.", [({}, overview.at)]),
        *_gauge(
            "swarm_model_health",
            "1 for the state that the model is in, 0 for the others.",
            [({**_names(one), "health": health}, float(one.health is health)) for one in models for health in Health],
        ),
        *_gauge(
            "swarm_model_survivable_deaths",
            "Servers that can die at once, whichever they are, and no block or expert is uncovered; -1: one is.",
            [(_names(one), -1.0 if one.survives is None else float(one.survives)) for one in models],
        ),
        *_gauge(
            "swarm_model_uncovered_blocks",
            "Blocks without a server that is online and answers.",
            [(_names(one), float(one.copies.count(0))) for one in models],
        ),
        *_gauge(
            "swarm_model_missing_experts",
            "Experts that nobody hosts and some server needs.",
            [(_names(one), float(one.experts.missing if one.experts else 0)) for one in models],
        ),
        *_gauge(
            "swarm_model_throughput_bound_steps_per_second",
            "Decode steps per second that no placement of the model's servers could exceed.",
            [(_names(one), one.bound_steps_per_s) for one in models],
        ),
        *_gauge(
            "swarm_model_sessions",
            "Sessions under way.",
            [(_names(one), float(one.sessions)) for one in models],
        ),
        *_gauge(
            "swarm_model_servers",
            "Servers by condition; those that died are counted for 10 minutes.",
            [
                ({**_names(one), "condition": condition}, float(one.servers.get(condition, 0)))
                for one in models
                for condition in Condition
            ],
        ),
    ]
    return "\n".join(lines) + "\n"


def _names(model: ModelView) -> dict[str, str]:
    return {"model": model.id, "name": model.name}


def _gauge(name: str, text: str, samples: Samples) -> list[str]:
    return metric(name, "gauge", text, samples)
