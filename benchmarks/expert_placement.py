"""Placement of experts, beside other ways to place them on the same machines: messages, balance, coverage.

A simulation (`swarm.simulation.experts`) over the functions by which servers choose experts, and layer servers choose
whom they ask. The traces: models shaped like Mixtral 8x7B (32 blocks of 8 experts, 2 a token), Qwen3 235B-A22B (94 of
128, 8 a token) and DeepSeek-V3 (58 of 256, 8 a token, after three dense blocks); machines of seven kinds as in
`swarm/simulation/world.py`, whose memory is scaled so that all together hold 2.5 copies of all experts on average, and
whose speed is that of reading experts from memory. They come within ten minutes, load for 30 to 90 s, keep what they
chose, stay for four hours on average and are replaced at random moments; all vanish without a word. In each block the
n-th most popular expert is chosen as often as n to the power of -0.8; each token has one of 16 topics, each of which
prefers an eighth of each block's experts, drawn by lot; 60% of the choice is among these. Whether real models are like
that was not measured.

*Small servers*: 60 of them, with three copies of 12 blocks of 256 experts, so that a usual one has room for 0.6 of a
block; *flat*: the same with popularity to the power of -0.3, and 90% of the choice among what the topic prefers.

*Messages*: to expert servers, for each token and block, of tokens that placement has not learned from, at three
moments: if nothing matters but that they are few; and *busy*, if all tokens come at once, servers answer the later the
more they were asked before, and layer servers have a patience of 1.5 (`swarm.routing.assign_experts`). *Busiest*: then
the load of the busiest server over that of all together. *Uncovered*, *single*: the share of time in which some expert
had no server, or one or none.

*Random* takes any expert, *by popularity* the one with most demand for what its servers can do; both first take those
without a server, then those with one, as ours does. *Coverage unknown* takes any, and what nobody hosts then costs no
message. *Affinity unknown*: ours, without counts of pairs.

Not in it: time on the wire; moves of servers that are there; layer servers that hold experts themselves.
"""

from __future__ import annotations

import time
from dataclasses import astuple, fields, replace
from typing import Any

from benchmarks.report import Report
from swarm.simulation import EXPERT_STRATEGIES, MODELS, ExpertModel, ExpertOutcome, ExpertWorld, simulate_experts

_SMALL_SERVERS = ExpertWorld(
    ExpertModel("12 blocks like DeepSeek-V3's", (256,) * 12, 8, 24_800_000), servers=60, copies=3
)
_WORLDS = {
    **{name: ExpertWorld(model) for name, model in MODELS.items()},
    "small_servers": _SMALL_SERVERS,
    "small_servers_flat": replace(_SMALL_SERVERS, zipf=0.3, topicality=0.9),
}


def main() -> None:
    """Run the benchmark."""
    report = Report.from_command_line(__doc__ or "")
    figures: dict[str, Any] = {}
    ratios = {}
    for name, world in _WORLDS.items():
        seeds = range(1 if report.quick else 8)
        messages = {}
        for strategy in EXPERT_STRATEGIES:
            begun = time.process_time()
            row = _mean([simulate_experts(replace(world, seed=seed), EXPERT_STRATEGIES[strategy]) for seed in seeds])
            messages[strategy] = row["messages"]
            figures |= {f"{name}_{_key(strategy)}_{key}": value for key, value in row.items()}
            text = ", ".join(f"{key} {value:.3g}" for key, value in row.items())
            report.progress(f"{name}, {strategy}: {text} ({time.process_time() - begun:.0f} s of one core)")
        ratios[f"affinity_dispatch_ratio_{name}"] = messages["ours"] / messages["random"]
    report.finish({**ratios, **figures})


def _mean(outcomes: list[ExpertOutcome]) -> dict[str, float]:
    names = [one.name for one in fields(ExpertOutcome)]
    values = zip(*map(astuple, outcomes), strict=True)
    return {name: sum(of_all) / len(outcomes) for name, of_all in zip(names, values, strict=True)}


def _key(name: str) -> str:
    return name.replace(",", "").replace(" ", "_")


if __name__ == "__main__":
    main()
