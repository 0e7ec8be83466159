"""Routes against brute force: never a dearer one, never a gap, and equal servers share the sessions."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.routing import HostedSpan, Leg, find_route, uncovered_blocks
from swarm.routing.route import HOP_S

BLOCKS = 5
quick = settings(deadline=None, max_examples=200)

SPEEDS = st.floats(0.1, 1000) | st.sampled_from([0.0, 1.0, 5e-324, 1e-300, 1e300, math.inf])


@st.composite
def snapshots(draw: st.DrawFn, *, speeds: st.SearchStrategy[float] = SPEEDS) -> list[HostedSpan]:
    """Up to five servers, each with some span of the model."""
    spans = []
    for index in range(draw(st.integers(0, 5))):
        start = draw(st.integers(0, BLOCKS - 1))
        end = draw(st.integers(start + 1, BLOCKS))
        spans.append(HostedSpan(f"peer{index}", start, end, draw(speeds)))
    return spans


@st.composite
def ranges(draw: st.DrawFn) -> tuple[int, int]:
    start = draw(st.integers(0, BLOCKS - 1))
    return start, draw(st.integers(start + 1, BLOCKS))


def cost(route: tuple[Leg, ...], spans: list[HostedSpan]) -> float:
    block_s = {span.peer_id: span.block_s for span in spans}
    return sum(HOP_S + (leg.end - leg.start) * block_s[leg.peer_id] for leg in route)


def least_cost(spans: list[HostedSpan], start: int, end: int) -> float:
    """The cost of the cheapest of all ways to give every block to one of its hosts."""
    hosts = [[span for span in spans if span.start <= block < span.end] for block in range(start, end)]
    return min(
        sum(span.block_s for span in way) + HOP_S * (1 + sum(a != b for a, b in itertools.pairwise(way)))
        for way in itertools.product(*hosts)
    )


@given(snapshots(), ranges(), st.text(max_size=3))
@quick
def test_no_route_is_cheaper(spans: list[HostedSpan], blocks: tuple[int, int], salt: str) -> None:
    route = find_route(spans, *blocks, salt=salt)
    if route is not None:
        assert cost(route, spans) == pytest.approx(least_cost(spans, *blocks), rel=1e-9, abs=1e-12)


@given(snapshots(), ranges(), st.text(max_size=3))
@quick
def test_a_route_covers_its_blocks_and_asks_servers_only_for_what_they_host(
    spans: list[HostedSpan], blocks: tuple[int, int], salt: str
) -> None:
    route = find_route(spans, *blocks, salt=salt)
    if route is None:
        return
    by_peer = {span.peer_id: span for span in spans}
    assert (route[0].start, route[-1].end) == blocks
    assert all(one.end == two.start and one.peer_id != two.peer_id for one, two in itertools.pairwise(route))
    assert all(by_peer[leg.peer_id].start <= leg.start < leg.end <= by_peer[leg.peer_id].end for leg in route)


@given(snapshots(), ranges())
@quick
def test_there_is_a_route_exactly_when_every_block_is_hosted(spans: list[HostedSpan], blocks: tuple[int, int]) -> None:
    missing = uncovered_blocks(spans, *blocks)
    assert (find_route(spans, *blocks) is None) == bool(missing)
    hosted = {block for span in spans for block in range(span.start, span.end)}
    assert missing == [block for block in range(*blocks) if block not in hosted]


@given(
    snapshots(speeds=st.sampled_from([1.0, 2.0]) | st.floats(0.5, 50)),
    st.text(max_size=3),
    st.randoms(use_true_random=False),
)
@quick
def test_the_same_snapshot_and_salt_give_the_same_route_in_any_order(
    spans: list[HostedSpan], salt: str, random: Random
) -> None:
    shuffled = list(spans)
    random.shuffle(shuffled)
    assert find_route(shuffled, 0, BLOCKS, salt=salt) == find_route(spans, 0, BLOCKS, salt=salt)


def test_sessions_spread_evenly_over_equal_servers() -> None:
    spans = [HostedSpan(f"peer{index} of {start}", start, start + 2, 10.0) for index in range(4) for start in (0, 2)]
    routes = [find_route(spans, 0, 4, salt=str(salt)) for salt in range(400)]
    for leg in (0, 1):
        chosen = Counter(route[leg].peer_id for route in routes if route is not None)
        assert len(chosen) == 4 and min(chosen.values()) > 60


def test_a_faster_server_is_preferred_whatever_the_salt() -> None:
    spans = [HostedSpan("slow", 0, 4, 10.0), HostedSpan("fast", 0, 4, 11.0), HostedSpan("unknown", 0, 4, 0.0)]
    assert {find_route(spans, 0, 4, salt=str(salt)) for salt in range(50)} == {(Leg("fast", 0, 4),)}


def test_a_server_is_left_and_joined_within_its_span() -> None:
    spans = [HostedSpan("first", 0, 4, 10.0), HostedSpan("second", 2, 6, 100.0)]
    assert find_route(spans, 0, 6) == (Leg("first", 0, 2), Leg("second", 2, 6))
    assert find_route(spans, 1, 3) == (Leg("first", 1, 2), Leg("second", 2, 3))


def test_a_change_of_server_must_win_more_than_it_costs() -> None:
    block_s = 0.05
    slow = HostedSpan("slow", 0, 4, 1 / (4 * block_s))
    a_little_faster = HostedSpan("faster", 3, 4, 1 / (block_s - 0.9 * HOP_S))
    much_faster = HostedSpan("faster", 3, 4, 1 / (block_s - 1.1 * HOP_S))
    assert find_route([slow, a_little_faster], 0, 4) == (Leg("slow", 0, 4),)
    assert find_route([slow, much_faster], 0, 4) == (Leg("slow", 0, 3), Leg("faster", 3, 4))


@pytest.mark.parametrize("steps_per_s", [0.0, 5e-324, 1e-310, math.nan])
def test_the_only_server_of_a_block_is_used_however_slow_it_says_it_is(steps_per_s: float) -> None:
    spans = [HostedSpan("fast", 0, 3, 100.0), HostedSpan("snail", 2, 4, steps_per_s)]
    assert find_route(spans, 0, 4) == (Leg("fast", 0, 3), Leg("snail", 3, 4))


def test_a_thousand_servers_of_a_large_model_are_no_trouble() -> None:
    spans = [HostedSpan(f"peer{index}", index % 100, index % 100 + 26, 1.0 + index % 7) for index in range(1000)]
    route = find_route(spans, 0, 125)
    assert route is not None and len(route) >= 5
