"""Experts: each has a server before any has two, what fires together lies together, and few servers are asked."""

from __future__ import annotations

import itertools
import math
import time
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.placement import (
    ExpertCoverage,
    ExpertDemand,
    ExpertHost,
    ExpertJoiner,
    choose_experts,
    local_experts,
    share_experts,
    wanted_repair,
)
from swarm.placement.expert_demand import Activations
from swarm.routing import ExpertChoice, assign_experts
from swarm.simulation.expert_dispatch import dispatches_per_token

quick = settings(deadline=None, max_examples=150)

SHAPE = st.lists(st.sampled_from([0, 1, 3, 8]), min_size=1, max_size=5)
MEMORIES = st.lists(st.integers(0, 60), min_size=1, max_size=12)
RANDOM = st.randoms(use_true_random=False)
COSTS = st.sampled_from([0.0, 0.01, 0.02, 0.05, 1.0])
HOSTED = st.lists(st.tuples(st.frozensets(st.integers(0, 11), max_size=8), COSTS), max_size=7)


def some_demand(shape: list[int], random: Random) -> ExpertDemand:
    """Random counts of some of the blocks."""
    numbers = np.random.default_rng(random.randrange(2**32))
    chosen, together = {}, {}
    for block, experts in enumerate(shape):
        if experts and random.random() < 0.8:
            chosen[block] = numbers.integers(0, 50, experts).astype(float)
            if random.random() < 0.7:
                pairs = numbers.integers(0, 9, (experts, experts)).astype(float)
                together[block] = np.triu(pairs, 1) + np.triu(pairs, 1).T
    return ExpertDemand(chosen, together)


def cells(experts: dict[int, frozenset[int]]) -> set[tuple[int, int]]:
    return {(block, one) for block, those in experts.items() for one in those}


def topical_tokens(experts: int, topics: int, chosen: int, count: int, seed: int) -> Activations:
    """One block; topics have experts of their own, whose numbers are mixed."""
    numbers = np.random.default_rng(seed)
    of_topic = np.random.default_rng(99).permutation(experts).reshape(topics, -1)
    rows = [numbers.choice(of_topic[numbers.integers(topics)], chosen, replace=False) for _ in range(count)]
    return {0: np.array(rows)}


# --- what a server hosts


@given(SHAPE, MEMORIES, RANDOM)
@quick
def test_memory_is_never_exceeded_and_only_experts_of_the_model_are_chosen(
    shape: list[int], memories: list[int], random: Random
) -> None:
    sizes = [random.randint(1, 9) for _ in shape]
    hosts: list[ExpertHost] = []
    for number, memory in enumerate(memories):
        chosen = choose_experts(hosts, shape, sizes, memory, some_demand(shape, random), peer_id=f"peer{number}")
        assert sum(sizes[block] * len(those) for block, those in chosen.items()) <= memory
        assert all(those and max(those) < shape[block] for block, those in chosen.items())
        hosts.append(ExpertHost(f"peer{number}", chosen, random.choice([0.0, 1.0, 30.0])))


@given(SHAPE, MEMORIES, RANDOM)
@quick
def test_an_expert_gets_its_first_server_before_others_a_second_and_its_second_before_others_a_third(
    shape: list[int], memories: list[int], random: Random
) -> None:
    sizes = [random.randint(1, 9) for _ in shape]
    all_cells = {(block, one) for block, experts in enumerate(shape) for one in range(experts)}
    hosts: list[ExpertHost] = []
    for number, memory in enumerate(memories):
        copies = {cell: sum(cell in cells(dict(one.experts)) for one in hosts) for cell in all_cells}
        experts = choose_experts(hosts, shape, sizes, memory, some_demand(shape, random), peer_id=f"peer{number}")
        chosen = cells(experts)
        for block, one in all_cells - chosen:
            in_need = min(copies[block, one], 2)
            before = sum(sizes[cell[0]] for cell in chosen if min(copies[cell], 2) <= in_need)
            assert memory - before < sizes[block]  # it did not fit, even without all that had more servers already
        hosts.append(ExpertHost(f"peer{number}", experts, 1.0))


@given(SHAPE, MEMORIES, RANDOM)
@quick
def test_who_knows_the_same_chooses_the_same(shape: list[int], memories: list[int], random: Random) -> None:
    sizes, demand = [random.randint(1, 9) for _ in shape], some_demand(shape, random)
    joiners = [ExpertJoiner(f"peer{number}", memory, random.random()) for number, memory in enumerate(memories)]
    hosts = [ExpertHost(peer_id, those, 0.1) for peer_id, those in share_experts(joiners, [], shape, sizes).items()]
    chosen = choose_experts(hosts, shape, sizes, 25, demand, peer_id="me")
    random.shuffle(hosts)
    assert choose_experts(iter(hosts), shape, sizes, 25, demand, peer_id="me") == chosen


@given(st.lists(st.sampled_from([2, 5, 8]), min_size=1, max_size=3), st.integers(1, 12), st.integers(1, 14), RANDOM)
@quick
def test_hot_experts_have_at_least_as_many_servers_as_cold_ones(
    shape: list[int], memory: int, servers: int, random: Random
) -> None:
    counts = {
        block: np.array([random.randint(1, 1000) for _ in range(experts)], float) for block, experts in enumerate(shape)
    }
    hosts: list[ExpertHost] = []
    for number in range(servers):
        chosen = choose_experts(hosts, shape, [1] * len(shape), memory, ExpertDemand(counts), peer_id=f"peer{number}")
        hosts.append(ExpertHost(f"peer{number}", chosen, 5.0))
    copies = ExpertCoverage.of(hosts, shape).copies
    for block, experts in enumerate(shape):
        by_heat = np.argsort(counts[block], kind="stable")
        for cold, hot in itertools.pairwise(by_heat[:experts]):
            assert copies[block, hot] >= copies[block, cold] or counts[block][hot] == counts[block][cold]


def test_copies_follow_demand() -> None:
    """Of servers for two experts each: what is chosen ten times as often has far more of them."""
    demand = ExpertDemand({0: np.array([100.0, 100.0, 10.0, 10.0, 10.0, 10.0])})
    hosts: list[ExpertHost] = []
    for number in range(24):
        chosen = choose_experts(hosts, [6], [1], 2, demand, peer_id=f"peer{number}")
        hosts.append(ExpertHost(f"peer{number}", chosen, 1.0))
    copies = ExpertCoverage.of(hosts, [6]).copies[0]
    assert copies[:2].min() >= 4 * copies[2:].max()


def test_whole_blocks_are_taken_where_possible_and_neighbours() -> None:
    chosen = choose_experts([], [0, *[8] * 20], [0, *[10] * 20], 240, peer_id="me")
    assert all(those == frozenset(range(8)) for those in chosen.values())
    assert len(chosen) == 3
    assert max(chosen) - min(chosen) == 2


def test_experts_that_fire_together_are_placed_together() -> None:
    tokens = topical_tokens(32, 4, 4, 400, seed=1)
    known = ExpertDemand.of(tokens, {0: 32})
    messages = {}
    for name, demand in (("affinity", known), ("popularity", ExpertDemand(known.chosen))):
        joiners = [ExpertJoiner(f"peer{number}", 8) for number in range(4)]
        hosts = [ExpertHost(one, those, 1.0) for one, those in share_experts(joiners, [], [32], [1], demand).items()]
        messages[name] = dispatches_per_token(hosts, topical_tokens(32, 4, 4, 100, seed=2))
    assert messages["affinity"] == 1.0
    assert messages["popularity"] > 2.0


def test_servers_that_join_at_once_share_what_is_missing() -> None:
    joiners = [ExpertJoiner(f"peer{number}", 16, 1.0) for number in range(6)]
    shared = share_experts(joiners, [ExpertHost("there", {0: frozenset(range(8))})], [8] * 7, [1] * 7)
    copies = ExpertCoverage.of([ExpertHost(one, those) for one, those in shared.items()], [8] * 7).copies
    assert set(shared) == {one.peer_id for one in joiners}
    assert ((copies[0] >= 0).all() and (copies[1:] == 2).all()) or copies.sum() == 96
    assert copies[1:].min() >= 1
    announced = [ExpertHost(one.peer_id, {1: frozenset({1})}) for one in joiners]  # what they had said before
    there = ExpertHost("there", {0: frozenset(range(8))})
    assert share_experts(reversed(joiners), [*announced, there], [8] * 7, [1] * 7) == shared


def test_a_model_of_15360_experts_on_500_servers_is_placed_within_seconds() -> None:
    shape, numbers = [256] * 60, np.random.default_rng(0)
    tokens = {block: np.argsort(numbers.random((300, 256)))[:, :8] for block in range(60)}
    demand = ExpertDemand.of(tokens, dict(enumerate(shape)))
    joiners = [ExpertJoiner(f"peer{number}", int(numbers.integers(20, 160)), 1.0) for number in range(500)]
    begun = time.process_time()
    shared = share_experts(joiners, [], shape, [1] * 60, demand)
    assert time.process_time() - begun < 10  # 0.7 s on an idle machine
    hosts = [ExpertHost(peer_id, experts, 1.0) for peer_id, experts in shared.items()]
    assert ExpertCoverage.of(hosts, shape).copies.min() >= 2


def test_experts_that_the_model_does_not_have_count_for_nothing() -> None:
    liar = ExpertHost("liar", {0: frozenset({0, 1, 7}), 5: frozenset({0}), -1: frozenset({0}), 1: frozenset({0})}, 1.0)
    assert ExpertCoverage.of([liar], [2, 0]).copies.tolist() == [[1, 1], [0, 0]]
    assert choose_experts([liar], [2, 2], [1, 1], 2) == {1: frozenset({0, 1})}


def test_sizes_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match="2 sizes of experts for 1 blocks"):
        choose_experts([], [8], [1, 1], 4)
    with pytest.raises(ValueError, match="at least one byte"):
        choose_experts([], [8, 0], [0, 0], 4)


# --- what a server takes over


@given(SHAPE, MEMORIES, RANDOM)
@quick
def test_what_nobody_hosts_is_taken_over_by_who_can_and_nothing_is_given_up_that_others_do_not_host(
    shape: list[int], memories: list[int], random: Random
) -> None:
    sizes = [random.randint(1, 9) for _ in shape]
    hosts: list[ExpertHost] = []
    for number, memory in enumerate(memories):
        chosen = choose_experts(hosts, shape, sizes, memory, peer_id=f"peer{number}")
        hosts.append(ExpertHost(f"peer{number}", chosen))
    dead = [one for one in hosts if random.random() < 0.4]
    alive = [(one, memory) for one, memory in zip(hosts, memories, strict=True) if one not in dead]
    everything = {(block, one) for block, experts in enumerate(shape) for one in range(experts)}
    for me, memory in alive:
        others = set[tuple[int, int]]().union(*(cells(dict(one.experts)) for one, _ in alive if one is not me))
        mine, nobody = cells(dict(me.experts)), everything - others - cells(dict(me.experts))
        new = wanted_repair(me, [one for one, _ in alive if one is not me], shape, sizes, memory)
        spare = memory - sum(sizes[block] for block, _ in mine - others)
        could = [cell for cell in nobody if sizes[cell[0]] <= spare]
        assert (new is not None) == bool(could)
        if new is not None:
            assert sum(sizes[block] * len(those) for block, those in new.items()) <= memory
            assert mine - others <= cells(new) <= mine | nobody
            left = memory - sum(sizes[block] * len(those) for block, those in new.items())
            assert all(sizes[block] > left for block, _ in (nobody | mine) - cells(new)), "all that fits is hosted"


def test_of_what_others_host_a_server_gives_up_no_more_than_it_must() -> None:
    me = ExpertHost("me", {0: frozenset(range(4)), 1: frozenset(range(4))})
    other = ExpertHost("other", {0: frozenset(range(4)), 1: frozenset({0})})
    new = wanted_repair(me, [other], [4, 4, 2], [1, 1, 1], 8)
    assert new is not None and new[2] == {0, 1} and new[1] >= {1, 2, 3}
    assert sum(map(len, new.values())) == 8
    assert wanted_repair(me, [other], [4, 4, 0], [1, 1, 1], 8) is None


# --- what a layer server holds itself


@given(SHAPE, st.integers(0, 90), RANDOM)
@quick
def test_a_layer_server_holds_whole_blocks_and_then_the_hottest_within_its_memory(
    shape: list[int], memory: int, random: Random
) -> None:
    sizes = {block: random.randint(1, 4) for block in range(len(shape))}
    demand = some_demand(shape, random)
    held = local_experts(dict(enumerate(shape)), sizes, memory, demand)
    left = memory - sum(sizes[block] * len(those) for block, those in held.items())
    assert left >= 0
    partly = [block for block in range(len(shape)) if len(held.get(block, ())) < shape[block]]
    for block in partly:
        assert left < sizes[block]
        shares, here = demand.shares(block, shape[block]), held.get(block, frozenset())
        colder = [shares[one] for one in here]
        assert not here or min(colder) >= max(shares[one] for one in range(shape[block]) if one not in here)


# --- who is asked


@given(st.frozensets(st.integers(0, 11), max_size=8), HOSTED, RANDOM)
@quick
def test_everything_that_somebody_hosts_is_assigned_once_to_nearly_the_fewest_servers(
    needed: frozenset[int], hosted: list[tuple[frozenset[int], float]], random: Random
) -> None:
    hosts = [ExpertChoice(f"peer{number}", experts, cost_s) for number, (experts, cost_s) in enumerate(hosted)]
    by_peer, uncovered = assign_experts(needed, hosts)
    experts = {one.peer_id: one.experts for one in hosts}
    assert sorted(itertools.chain(uncovered, *by_peer.values())) == sorted(needed)
    assert all(those and those <= experts[peer_id] for peer_id, those in by_peer.items())
    assert not uncovered & frozenset().union(*experts.values())

    coverable = needed - uncovered
    fewest = next(
        count
        for count in range(len(hosts) + 1)
        if any(coverable <= frozenset().union(*some) for some in itertools.combinations(experts.values(), count))
    )
    assert fewest <= len(by_peer) <= max(fewest, math.floor(fewest * (1 + math.log(max(len(coverable), 1)))))
    assert len(by_peer) == fewest or fewest >= 2

    random.shuffle(hosts)
    assert assign_experts(sorted(needed), hosts) == (by_peer, uncovered)


@given(st.frozensets(st.integers(0, 11), max_size=8), HOSTED, st.sampled_from([0.5, 1.0, 1.5, 4.0]))
@quick
def test_nobody_is_asked_who_makes_the_layer_wait_longer_than_patience_allows(
    needed: frozenset[int], hosted: list[tuple[frozenset[int], float]], patience: float
) -> None:
    hosts = [ExpertChoice(f"peer{number}", experts, cost_s) for number, (experts, cost_s) in enumerate(hosted)]
    by_peer, uncovered = assign_experts(needed, hosts, patience=patience)
    assert uncovered == assign_experts(needed, hosts).uncovered
    soonest_s = [min(one.cost_s for one in hosts if expert in one.experts) for expert in needed - uncovered]
    cost_s = {one.peer_id: one.cost_s for one in hosts}
    assert all(cost_s[peer_id] <= max(patience, 1) * max(soonest_s, default=0.0) for peer_id in by_peer)


def test_of_as_few_servers_the_soonest_are_asked() -> None:
    slow, quick_one = ExpertChoice("a", frozenset({1, 2, 3}), 0.5), ExpertChoice("b", frozenset({1, 2, 3}), 0.1)
    part = ExpertChoice("c", frozenset({1}), 0.01)
    assert assign_experts({1, 2, 3}, [slow, quick_one, part]).by_peer == {"b": frozenset({1, 2, 3})}
    assert assign_experts({1}, [slow, quick_one, part]).by_peer == {"c": frozenset({1})}


def test_what_two_of_those_asked_host_is_computed_by_the_sooner_one() -> None:
    hosts = [ExpertChoice("slow", frozenset({1, 2, 3}), 0.5), ExpertChoice("quick", frozenset({3, 4}), 0.1)]
    assert assign_experts([1, 2, 3, 4], hosts).by_peer == {"quick": frozenset({3, 4}), "slow": frozenset({1, 2})}


def test_a_server_that_turns_out_not_to_be_needed_is_not_asked() -> None:
    """The largest is taken first, but the two that complete it would do without it."""
    hosts = [
        ExpertChoice("large", frozenset({2, 3, 4, 5}), 0.1),
        ExpertChoice("left", frozenset({1, 2, 3}), 0.1),
        ExpertChoice("right", frozenset({4, 5, 6}), 0.1),
    ]
    assert set(assign_experts(range(1, 7), hosts).by_peer) == {"left", "right"}
