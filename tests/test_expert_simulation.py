"""Simulated expert servers: the same seed gives the same course, and placing what fires together saves messages."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from swarm.commands.main import main
from swarm.placement import ExpertHost
from swarm.simulation import EXPERT_STRATEGIES, ExpertModel, ExpertOutcome, ExpertWorld, simulate_experts
from swarm.simulation.expert_dispatch import dispatch

MODEL = ExpertModel("small", (0, *[64] * 6), 6, 1_000_000)
WORLD = ExpertWorld(MODEL, servers=12, copies=4, duration_s=1800, ramp_s=300, tokens=40, learned_tokens=800, looks=2)


def run(world: ExpertWorld, strategy: str = "ours") -> ExpertOutcome:
    return simulate_experts(world, EXPERT_STRATEGIES[strategy])


@pytest.mark.parametrize("strategy", EXPERT_STRATEGIES)
def test_the_same_seed_gives_the_same_course(strategy: str) -> None:
    assert run(WORLD, strategy) == run(WORLD, strategy) != run(replace(WORLD, seed=1), strategy)


def test_machines_and_lives_do_not_depend_on_the_strategy_and_no_memory_is_exceeded() -> None:
    outcomes = [run(WORLD, strategy) for strategy in EXPERT_STRATEGIES]
    assert len({one.servers for one in outcomes}) == 1
    assert all(0.9 < one.most_memory <= 1 for one in outcomes)


def test_our_placement_asks_fewer_servers_than_others_and_shares_the_work_no_worse() -> None:
    world = replace(WORLD, servers=20, copies=3)
    ours, popular, chance = (run(world, name) for name in ("ours", "by popularity", "random"))
    assert ours.messages < 0.6 * min(popular.messages, chance.messages)
    assert ours.messages_busy < 0.6 * min(popular.messages_busy, chance.messages_busy)
    assert ours.busiest < chance.busiest


def test_affinity_helps_where_no_server_has_room_for_a_block() -> None:
    world = replace(WORLD, servers=40, copies=3, topicality=0.9, zipf=0.3, mean_life_s=1e9)
    ours, unknown, chance = (run(world, name) for name in ("ours", "ours, affinity unknown", "random"))
    assert ours.messages < unknown.messages < chance.messages


def test_experts_are_covered_while_servers_come_and_go() -> None:
    assert run(WORLD).uncovered_time == 0
    few = replace(WORLD, copies=2.5, seed=3)
    assert run(few, "random, coverage unknown").uncovered_time > run(few).uncovered_time


def test_tokens_choose_popular_experts_and_those_of_their_topic() -> None:
    chosen = WORLD.tokens_of().take(2000)
    assert sorted(chosen) == [1, 2, 3, 4, 5, 6]
    assert all(len(set(row)) == 6 for row in chosen[1][:100])
    hits = np.sort(np.bincount(chosen[1].ravel(), minlength=64))
    assert hits[-8:].sum() > 4 * hits[:8].sum()


def test_a_dispatch_is_counted_by_hand() -> None:
    hosts = [ExpertHost("a", {0: frozenset({0, 1})}, 2.0), ExpertHost("b", {0: frozenset({1, 2})}, 1.0)]
    found = dispatch(hosts, {0: np.array([[0, 1], [0, 2], [1, 2]])})
    assert found.messages == pytest.approx(4 / 3)
    assert found.busiest == pytest.approx(1.5)  # each did three of six rows; b has a third of the speed: 3 / (6 / 3)


def test_the_command_compares_placements(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--experts", "mixtral", "--servers", "8", "--hours", "0.3", "--json"]) == 0
    outcome = json.loads(capsys.readouterr().out)
    assert 0 < outcome["affinity_dispatch_ratio"] < 1
    assert set(outcome["strategies"]) == set(EXPERT_STRATEGIES)
    assert main(["simulate", "--experts", "mixtral", "--servers", "8", "--hours", "0.1"]) == 0
    assert "8 servers of 32 blocks of 8 experts, 2 a token" in capsys.readouterr().out
    assert main(["simulate", "--experts", "mixtral", "--cut-at", "10"]) == 1
    assert "--cut-at says nothing of experts" in capsys.readouterr().err
