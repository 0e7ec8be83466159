"""``swarm simulate``: what becomes of a swarm of so many servers."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from swarm.commands import simulate_experts
from swarm.commands.output import Output
from swarm.simulation import STRATEGIES, Outcome, World, simulate
from swarm.simulation.plots import plot

_EPILOG = """\
Servers choose their blocks, and move, by the very functions that live ones use; machines, lives and failures are made
up (swarm/simulation/world.py says how). The same seed gives the same course.

examples:
  swarm simulate                                          100 servers of a model of 80 blocks, one hour
  swarm simulate --servers 1000 --fail-at 40 --plot course.svg
                                                          30% of 1,000 vanish after 40 minutes; draw what happens
  swarm simulate --servers 10000                          about a minute and a half on one core
  swarm simulate --strategy petals --life 1               Petals' rule instead; servers stay for an hour
  swarm simulate --experts qwen3 --servers 30             30 servers of experts; beside other ways to place them"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.epilog, parser.formatter_class = _EPILOG, argparse.RawDescriptionHelpFormatter
    swarm = parser.add_argument_group("the swarm")
    swarm.add_argument("--servers", type=int, help="as many as there are on average (100; with --experts 16)")
    swarm.add_argument("--blocks", type=int, default=80, help="of the model (80)")
    swarm.add_argument("--block-gb", type=float, default=0.9, help="weights of a block, with its KV cache (0.9)")
    swarm.add_argument("--hours", type=float, default=1.0, help="simulated time (1)")
    swarm.add_argument("--life", type=float, default=4.0, metavar="HOURS", help="how long servers stay, on average (4)")
    swarm.add_argument("--diurnal", type=float, default=0.0, help="how far arrivals swing within a day, 0 to 1 (0)")
    swarm.add_argument("--delay", type=float, default=3.0, metavar="S", help="until others see what one announces (3)")
    swarm.add_argument("--seed", type=int, default=0, help="another one gives another course (0)")
    simulate_experts.add_arguments(parser)
    trouble = parser.add_argument_group("trouble")
    trouble.add_argument("--fail-at", type=float, metavar="MINUTES", help="many servers vanish at this moment")
    trouble.add_argument("--fail-share", type=float, default=0.3, help="so many of all (0.3)")
    trouble.add_argument("--cut-at", type=float, metavar="MINUTES", help="one of three regions cannot be reached")
    trouble.add_argument("--cut-for", type=float, default=5.0, metavar="MINUTES", help="for so long (5)")
    parser.add_argument(
        "--strategy", choices=sorted(_STRATEGIES), default="ours", help="how servers decide; others are to compare with"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the course (.svg, .png); needs 'swarm[plots]'")


def run(options: argparse.Namespace, output: Output) -> int:
    """Simulate and tell."""
    if options.experts is not None:
        return simulate_experts.run(options, _defaults(), output)
    world = _world(options)
    with tqdm(total=round(world.duration_s), unit="s", desc="Simulating", delay=2.0, leave=False) as bar:
        outcome = simulate(
            world, STRATEGIES[_STRATEGIES[options.strategy]](), lambda at_s: bar.update(int(at_s) - bar.n)
        )
    figures = _figures(outcome, world)
    output.event(event="outcome", world=asdict(world), strategy=options.strategy, **figures)
    if not output.json:
        _show(figures, world)
    if options.plot is not None:
        plot(outcome, f"{world.servers} servers, {world.num_blocks} blocks, seed {world.seed}", options.plot)
        output.say(f"The course is drawn in {options.plot}.")
    return 0


_STRATEGIES = {"ours": "ours", "petals": "Petals' rule", "greedy": "greedy", "random": "random"}


def _defaults() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([])


def _world(options: argparse.Namespace) -> World:
    if options.servers is None:
        options.servers = 100
    for name, least in (
        ("servers", 1),
        ("blocks", 1),
        ("block_gb", 1e-6),
        ("hours", 1e-3),
        ("life", 1e-3),
        ("delay", 0),
    ):
        if not getattr(options, name) >= least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least:g}")
    for name in ("diurnal", "fail_share"):
        if not 0 <= getattr(options, name) <= 1:
            raise ValueError(f"--{name.replace('_', '-')} must be between 0 and 1")
    duration_s = 3600 * options.hours
    return World(
        servers=options.servers,
        num_blocks=options.blocks,
        block_gb=options.block_gb,
        duration_s=duration_s,
        ramp_s=min(600.0, duration_s / 6),
        mean_life_s=3600 * options.life,
        diurnal=options.diurnal,
        view_delay_s=options.delay,
        mass_failure_at_s=60 * options.fail_at if options.fail_at is not None else None,
        mass_failure_share=options.fail_share,
        partition_at_s=60 * options.cut_at if options.cut_at is not None else None,
        partition_s=60 * options.cut_for,
        seed=options.seed,
    )


def _figures(outcome: Outcome, world: World) -> dict[str, float | int]:
    begin_s = min(1.5 * world.ramp_s + world.load_s[1], world.duration_s / 2)
    return {
        "steady_from_s": begin_s,
        "share_of_bound": outcome.share_of_bound(begin_s, world.duration_s),
        "uncovered_time_share": outcome.uncovered_share(begin_s, world.duration_s),
        "moves": len(outcome.moves_at_s),
        "moves_per_server_hour": outcome.moves_per_server_hour(begin_s, world.duration_s),
        "focus_changes": len(outcome.refocused_at_s),
        "recovery_s": outcome.recovery_s(),
    }


def _show(figures: dict[str, float | int], world: World) -> None:
    table = Table(
        title=f"{world.servers} servers of {world.num_blocks} blocks, {world.duration_s / 3600:g} h", min_width=60
    )
    table.add_column("from when all have come")
    table.add_column("", justify="right")
    table.add_row("slowest block, of what the mean block does", f"{figures['share_of_bound']:.1%}")
    table.add_row("time in which a block had no server", f"{figures['uncovered_time_share']:.2%}")
    table.add_row("moves per server and hour", f"{figures['moves_per_server_hour']:.2f}")
    table.add_row("moves, from the beginning", f"{figures['moves']:,}")
    table.add_row("changes of focus, for which nothing is loaded", f"{figures['focus_changes']:,}")
    if world.mass_failure_at_s is not None:
        table.add_row("until every block had a server again", f"{figures['recovery_s']:.0f} s")
    Console().print(table)
