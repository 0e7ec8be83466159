"""``swarm simulate --experts``: what becomes of a swarm of expert servers, and what it would be if placed otherwise."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from swarm.commands.output import Output
from swarm.simulation import EXPERT_STRATEGIES, MODELS, ExpertOutcome, ExpertWorld, simulate_experts

_WITHOUT_MEANING = (
    "blocks", "block_gb", "diurnal", "delay", "fail_at", "fail_share", "cut_at", "cut_for", "strategy", "plot",
)  # fmt: skip
"""Options that say nothing of experts."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare those that only expert servers have."""
    experts = parser.add_argument_group("expert servers")
    experts.add_argument(
        "--experts",
        choices=sorted(MODELS),
        help="servers of experts of such a model; beside other placements",
    )
    experts.add_argument(
        "--copies", type=float, default=2.5, help="their memory is that of so many copies of all experts (2.5)"
    )


def run(options: argparse.Namespace, defaults: argparse.Namespace, output: Output) -> int:
    """Simulate with every way to place experts, and tell."""
    world = _world(options, defaults)
    outcomes = {}
    for name, strategy in EXPERT_STRATEGIES.items():
        with tqdm(total=round(world.duration_s), unit="s", desc=f"Simulating, {name}", delay=2.0, leave=False) as bar:
            outcomes[name] = simulate_experts(world, strategy, lambda at_s, bar=bar: bar.update(int(at_s) - bar.n))  # type: ignore[misc]
    output.event(
        event="outcome",
        world=asdict(world) | {"model": world.model.name},
        affinity_dispatch_ratio=outcomes["ours"].messages / outcomes["random"].messages,
        strategies={name: asdict(outcome) for name, outcome in outcomes.items()},
    )
    if not output.json:
        _show(outcomes, world)
    return 0


def _world(options: argparse.Namespace, defaults: argparse.Namespace) -> ExpertWorld:
    for name in _WITHOUT_MEANING:
        if getattr(options, name) != getattr(defaults, name):
            raise ValueError(f"--{name.replace('_', '-')} says nothing of experts; leave it out, or --experts")
    servers = 16 if options.servers is None else options.servers
    for name, value, least in (
        ("servers", servers, 1),
        ("hours", options.hours, 1e-3),
        ("life", options.life, 1e-3),
        ("copies", options.copies, 1e-3),
    ):
        if not value >= least:
            raise ValueError(f"--{name} must be at least {least:g}")
    duration_s = 3600 * options.hours
    return ExpertWorld(
        MODELS[options.experts],
        servers=servers,
        copies=options.copies,
        duration_s=duration_s,
        ramp_s=min(600.0, duration_s / 6),
        mean_life_s=3600 * options.life,
        seed=options.seed,
    )


def _show(outcomes: dict[str, ExpertOutcome], world: ExpertWorld) -> None:
    blocks, chosen = world.model.blocks, world.model.chosen
    table = Table(
        title=f"{world.servers} servers of {len(blocks)} blocks of {max(blocks.values())} experts, {chosen} a token"
    )
    for heading in ("experts are placed", "messages", "if busy", "busiest server", "uncovered", "one copy or none"):
        table.add_column(heading, justify="left" if heading == "experts are placed" else "right")
    for name, one in outcomes.items():
        table.add_row(
            name,
            f"{one.messages:.2f}",
            f"{one.messages_busy:.2f}",
            f"{one.busiest:.1f}×",
            f"{one.uncovered_time:.1%}",
            f"{one.single_time:.1%}",
        )
    table.caption = (
        "messages: for each token and block, if only they matter, and if all are busy; busiest: its load over that of "
        "all together; the rest: share of time in which some expert had no server, or one or none"
    )
    Console().print(table)
