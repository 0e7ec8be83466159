"""Pure decisions against brute force: routes, spans for joiners, memory plans, silence, logs of activations."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.client.activations import ActivationLog
from swarm.commands.server import parse_blocks, parse_size
from swarm.errors import InsufficientMemory
from swarm.placement import choose_span
from swarm.routing import HostedSpan, Leg, find_route, uncovered_blocks
from swarm.routing.route import HOP_S
from swarm.server.plan import MIB, make_plan, size
from swarm.transport.heartbeat import Heartbeat

BLOCKS = 4
SPANS = st.lists(
    st.tuples(st.integers(0, BLOCKS - 1), st.integers(1, BLOCKS), st.floats(0.5, 50)).filter(lambda s: s[0] < s[1]),
    max_size=5,
).map(lambda spans: [HostedSpan(f"peer{i}", *span) for i, span in enumerate(spans)])


def cost(legs: tuple[Leg, ...], spans: list[HostedSpan]) -> float:
    by_peer = {span.peer_id: span for span in spans}
    return sum(HOP_S + (leg.end - leg.start) * by_peer[leg.peer_id].block_s for leg in legs)


def cheapest(spans: list[HostedSpan]) -> float:
    """Try every assignment of a server to each block."""
    hosts = [[span for span in spans if span.start <= block < span.end] for block in range(BLOCKS)]
    best = math.inf
    for choice in itertools.product(*hosts):
        changes = 1 + sum(one.peer_id != two.peer_id for one, two in itertools.pairwise(choice))
        best = min(best, changes * HOP_S + sum(span.block_s for span in choice))
    return best


@given(SPANS, st.text(max_size=3))
@settings(deadline=None, max_examples=300)
def test_a_route_is_the_cheapest_and_covers_every_block(spans: list[HostedSpan], salt: str) -> None:
    route = find_route(spans, 0, BLOCKS, salt=salt)
    if route is None:
        assert uncovered_blocks(spans, 0, BLOCKS)
        return
    by_peer = {span.peer_id: span for span in spans}
    assert [leg.start for leg in route] + [BLOCKS] == [0] + [leg.end for leg in route]
    assert all(by_peer[leg.peer_id].start <= leg.start < leg.end <= by_peer[leg.peer_id].end for leg in route)
    assert cost(route, spans) == pytest.approx(cheapest(spans))
    assert route == find_route(list(reversed(spans)), 0, BLOCKS, salt=salt)


def test_sessions_spread_over_equal_servers() -> None:
    spans = [HostedSpan(f"peer{i}", 0, BLOCKS, 1.0) for i in range(4)]
    chosen = {find_route(spans, 0, BLOCKS, salt=str(salt))[0].peer_id for salt in range(50)}  # type: ignore[index]
    assert len(chosen) == 4


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=6), st.integers(1, 12))
def test_a_joiner_takes_the_blocks_that_fewest_host(hosted: list[tuple[int, int]], length: int) -> None:
    start, end = choose_span(hosted, 10, length)
    assert 0 <= start < end <= 10 and end - start == min(length, 10)

    def coverage(first: int) -> list[int]:
        return sorted(sum(a <= block < b for a, b in hosted) for block in range(first, first + end - start))

    assert coverage(start) == min(coverage(first) for first in range(10 - (end - start) + 1))


@given(st.integers(0, 4000), st.integers(1, 40), st.integers(100, 10_000), st.none() | st.integers(1, 9000))
def test_a_plan_never_exceeds_what_is_allowed(memory: int, blocks: int, kv: int, tokens: int | None) -> None:
    try:
        plan = make_plan([20 * MIB] * blocks, kv, memory * MIB, "--memory", kv_tokens=tokens)
    except InsufficientMemory as error:
        assert "--memory" in str(error) and "only" in str(error)
    else:
        assert plan.total_bytes <= memory * MIB
        assert 1 <= plan.num_blocks <= blocks and plan.kv_tokens >= (tokens or 1)


def test_a_plan_that_does_not_fit_says_what_would() -> None:
    with pytest.raises(InsufficientMemory, match=r"--num-blocks \d+"):
        make_plan([100 * MIB] * 10, 1024, 1000 * MIB, "--memory", num_blocks=10)


def test_sizes_and_spans_are_read_and_written_as_people_do() -> None:
    assert [size(count) for count in (12, 2048, 3 * MIB, 5 * 1024 * MIB)] == ["12 B", "2.0 KiB", "3.0 MiB", "5.0 GiB"]
    assert [parse_size(text) for text in ("12GiB", "800M", "1.5 GB", "77")] == [12 * 1024**3, 800 * MIB, 1536 * MIB, 77]
    assert (parse_blocks("0:15"), parse_blocks("auto")) == ((0, 15), None)


def test_a_peer_is_dead_only_when_it_leaves_a_question_unanswered() -> None:
    heartbeat = Heartbeat(interval_s=1.0, timeout_s=5.0)
    heartbeat.heard(0.0)
    assert not heartbeat.should_ask(0.5) and not heartbeat.is_dead(100.0)
    assert heartbeat.should_ask(1.0) and not heartbeat.is_dead(5.9)
    assert heartbeat.is_dead(6.0)
    heartbeat.heard(6.0)  # slow, but alive
    assert not heartbeat.is_dead(6.5)


@given(st.lists(st.tuples(st.sampled_from(["append", "truncate", "reorder"]), st.integers(0, 5)), max_size=12))
@settings(deadline=None)
def test_the_log_of_activations_is_a_plain_tensor_by_other_means(actions: list[tuple[str, int]]) -> None:
    log, model = ActivationLog(), torch.empty(2, 0, 3)
    for action, number in actions:
        if action == "append":
            new = torch.rand(model.shape[0], number + 1, 3)
            log.append(new)
            model = torch.cat([model, new], dim=1)
        elif action == "truncate":
            log.truncate(number)
            model = model[:, :number]
        elif model.shape[1]:
            rows = torch.arange(number + 1) % model.shape[0]
            log.reorder(rows)
            model = model[rows]
        assert len(log) == model.shape[1]
    if len(log):
        assert torch.equal(log.since(0), model)
