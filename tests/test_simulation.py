"""A simulated swarm has the same course for the same seed, recovers from what befalls it, and is better than chance."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from swarm.commands.main import main
from swarm.simulation import STRATEGIES, Outcome, World, simulate
from swarm.simulation.outcome import Sample

SMALL = World(servers=30, num_blocks=40, duration_s=1200, ramp_s=120, mean_life_s=3600)


def run(world: World, strategy: str = "ours") -> Outcome:
    return simulate(world, STRATEGIES[strategy]())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_same_seed_gives_the_same_course(strategy: str) -> None:
    first, second = run(SMALL, strategy), run(SMALL, strategy)
    assert first.samples == second.samples
    assert first.moves_at_s == second.moves_at_s
    assert run(World(servers=30, num_blocks=40, duration_s=1200, ramp_s=120, seed=1), strategy).samples != first.samples


def test_who_comes_and_goes_does_not_depend_on_the_strategy() -> None:
    quiet = World(servers=30, num_blocks=40, duration_s=1200, ramp_s=120, load_s=(0, 0))
    courses = [run(quiet, strategy) for strategy in ("greedy", "random")]
    assert [one.servers for one in courses[0].samples] == [one.servers for one in courses[1].samples]


def test_a_swarm_is_covered_evenly_and_stays_so() -> None:
    outcome = run(SMALL)
    assert outcome.uncovered_share(400, 1200) == 0
    assert outcome.share_of_bound(400, 1200) > 0.8 > run(SMALL, "random").share_of_bound(400, 1200)


def test_blocks_whose_servers_all_vanish_are_hosted_again_soon() -> None:
    lost = []
    for seed in range(8):
        world = World(
            servers=12, num_blocks=40, block_gb=2, duration_s=1500, ramp_s=60, mean_life_s=1e9, mass_failure_at_s=600,
            mass_failure_share=0.5, load_s=(30, 30), seed=seed,
        )  # fmt: skip
        outcome = run(world)
        lost.append(outcome.recovery_s())
    recovered = [one for one in lost if 0 < one < 900]
    assert recovered  # some lost a block, and were not too small to host all of them again
    assert max(recovered) <= 60 + 30


def test_a_region_that_is_cut_off_comes_back() -> None:
    world = World(
        servers=30, num_blocks=40, duration_s=900, ramp_s=60, mean_life_s=1e9, partition_at_s=400, partition_s=200
    )  # fmt: skip
    servers = {one.at_s: one.servers for one in run(world).samples}
    bounds = {one.at_s: one.bound_steps_per_s for one in run(world).samples}
    assert bounds[500] < 0.9 * bounds[390]
    assert bounds[800] == pytest.approx(bounds[390], rel=0.2)
    assert servers[800] == 30


def test_figures_are_those_of_the_samples() -> None:
    samples = [Sample(10.0 * n, 4, 0, 0, 3.0 if n < 5 else 1.0, 4.0, n // 5) for n in range(10)]
    outcome = Outcome(samples, [50.0], [(0.0, 10.0), (60.0, 85.0)], mass_failure_at_s=60.0)
    assert outcome.share_of_bound(0, 50) == 0.75
    assert outcome.uncovered_share(0, 100) == pytest.approx(0.35)
    assert outcome.moves_per_server_hour(0, 100) == pytest.approx(9)
    assert outcome.recovery_s() == 25


def test_the_command_tells_scripts_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "course.svg"
    arguments = ["--servers", "20", "--blocks", "30", "--hours", "0.3", "--fail-at", "10", "--plot", str(picture)]
    assert main(["simulate", *arguments, "--json"]) == 0
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["world"]["servers"] == 20
    assert 0 < outcome["share_of_bound"] <= 1
    assert "<svg" in picture.read_text()


def test_the_command_refuses_nonsense(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--servers", "0"]) == 1
    assert "--servers must be at least 1" in capsys.readouterr().err
    assert main(["simulate", "--hours", "0.1", "--plot", "/nowhere/course.svg"]) == 1
    assert "cannot be written to /nowhere/course.svg" in capsys.readouterr().err
