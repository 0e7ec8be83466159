"""Placement of 10 to 10,000 servers, beside other ways to decide: how evenly, how reliably, with how many moves.

A simulation (`swarm.simulation`) in which servers decide by the very functions that live ones use. The traces: a model
of 80 blocks of 0.9 GB; machines of seven kinds, from an RTX 3060 to an A100 and a workstation without a GPU
(`swarm/simulation/world.py`); they come at random within ten minutes, load for 30 to 90 s, stay for four hours on
average (exponentially distributed) and are replaced; half of them vanish without a word and are seen for 12 s more,
announcements are seen 3 s late. After 40 of 60 minutes 30% of all vanish at once. Everybody gets the same machines,
lives and deaths.

*Share of the bound*: the speed of the slowest block over that of the mean block, which is what no placement of the same
spans can exceed, averaged over minutes 17 to 40, and over 43 to 60 (*after* the failure). *Ours* is `swarm.placement`;
*Petals' rule* is written anew from its description: newcomers take the worst window, and a server moves by itself if
the swarm reaches less than 0.75 of what greedy moves of everybody would reach; *greedy* joins likewise and never moves;
*random* joins anywhere. *Moves*, after which a server has to load, count from the first minute to the last, as do
*focus changes*: a server hosts another part of what it has loaded, at once, and no session has to leave it.

*Moves alone* and *focus alone* are ours without the one or the other: with 10 and 100 servers.

Not in it: what the Petals paper used for its own experiment, which it does not tell exactly.
"""

from __future__ import annotations

import time
from typing import Any

from benchmarks.report import Report
from swarm.placement import FocusPolicy, MovePolicy
from swarm.simulation import STRATEGIES, Outcome, World, simulate
from swarm.simulation.strategies import Ours

_STEADY_S = (1000.0, 2400.0)
_AFTER_S = (2600.0, 3600.0)
_WHOLE_S = (1000.0, 3600.0)
_MASS_FAILURE_S = 2400.0
_WITHOUT = {
    "moves_alone": MovePolicy(least_share=0.02, focus=FocusPolicy(narrowest=1.0)),
    "focus_alone": MovePolicy(least_share=float("inf")),
}
"""Without changes of focus (and then by the threshold for moves that was best), and without moves for speed."""


def main() -> None:
    """Run the benchmark."""
    report = Report.from_command_line(__doc__ or "")
    seeds = {10: 8, 100: 4, 1000: 1} if report.quick else {10: 20, 100: 10, 1000: 3, 10_000: 1}
    figures: dict[str, Any] = {}
    shares, moves, recoveries, uncovered = [], dict.fromkeys(STRATEGIES, 0), [], []
    for servers, runs in seeds.items():
        for name, strategy in STRATEGIES.items():
            begun = time.process_time()
            outcomes = [simulate(_world(servers, seed), strategy()) for seed in range(runs)]
            row = _row(outcomes)
            moves[name] += sum(len(one.moves_at_s) for one in outcomes)
            if name == "ours":
                recoveries += [one.recovery_s() for one in outcomes]
                if servers >= 100:
                    shares.append(row["share_of_bound"])
                    uncovered.append(row["uncovered_time_share"])
            figures |= {f"{_key(name)}_{servers}_{key}": value for key, value in row.items()}
            report.progress(
                f"{servers:,} servers, {name}: {_text(row)} ({time.process_time() - begun:.0f} s of one core)"
            )
    for servers in (10, 100):
        for name, policy in _WITHOUT.items():
            row = _row([simulate(_world(servers, seed), Ours(policy)) for seed in range(seeds[servers])])
            figures |= {f"{name}_{servers}_{key}": value for key, value in row.items()}
            report.progress(f"{servers} servers, {name.replace('_', ' ')}: {_text(row)}")
    report.finish(
        {
            "share_of_bound_min": min(shares),
            "moves_over_petals_rule": moves["ours"] / max(1, moves["Petals' rule"]),
            "recovery_s_max": max(recoveries),
            "uncovered_time_share": max(uncovered),
            **figures,
        }
    )


def _world(servers: int, seed: int) -> World:
    return World(servers=servers, seed=seed, mass_failure_at_s=_MASS_FAILURE_S)


def _row(outcomes: list[Outcome]) -> dict[str, float]:
    """Means over runs; recovery: the longest."""
    return {
        "share_of_bound": _mean([one.share_of_bound(*_STEADY_S) for one in outcomes]),
        "share_after_failure": _mean([one.share_of_bound(*_AFTER_S) for one in outcomes]),
        "uncovered_time_share": _mean([one.uncovered_share(*_WHOLE_S) for one in outcomes]),
        "moves_per_server_hour": _mean([one.moves_per_server_hour(*_WHOLE_S) for one in outcomes]),
        "moves": _mean([len(one.moves_at_s) for one in outcomes]),
        "focus_changes": _mean([len(one.refocused_at_s) for one in outcomes]),
        "slowest_steps_per_s": _mean([one.steps_per_s(*_STEADY_S) for one in outcomes]),
        "blocks_each": _mean([one.blocks_each(*_STEADY_S) for one in outcomes]),
        "recovery_s": max(one.recovery_s() for one in outcomes),
    }


def _text(row: dict[str, float]) -> str:
    return ", ".join(f"{key} {value:.3g}" for key, value in row.items())


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _key(name: str) -> str:
    return name.lower().replace("'", "").replace(" ", "_")


if __name__ == "__main__":
    main()
