"""Routes against brute force: never a dearer one, never a gap, and equal servers share the sessions."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.routing import (
    HOP_S,
    PROFILES,
    ClientLinks,
    HostedSpan,
    Leg,
    Profile,
    find_route,
    least_seconds,
    route_seconds,
    uncovered_blocks,
    with_estimates,
    worth_rerouting,
)

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
    random = Random(0)
    spans = [
        HostedSpan(
            f"peer{index}",
            start := index % 65,
            start + 16,
            1.0 + index % 7,
            rtts_s={f"peer{random.randrange(1000)}": random.uniform(0.01, 0.3) for _ in range(8)},
        )
        for index in range(1000)
    ]
    find_route(spans[:10], 0, 2)
    begun = time.process_time()
    route = find_route(spans, 0, 80, profile=PROFILES["interactive"], tolerance=0.05, salt="any")
    assert time.process_time() - begun < 0.5  # about 0.05 s on a machine with nothing else to do
    assert route is not None and len(route) >= 5


# links


PEERS = [f"peer{index}" for index in range(5)]
RTTS = st.dictionaries(st.sampled_from(PEERS), st.floats(0, 0.5), max_size=5)
LINKS = st.builds(ClientLinks, RTTS, st.none() | st.floats(1e3, 1e9), st.none() | st.floats(1e3, 1e9))
WORK = st.sampled_from(list(PROFILES.values())) | st.builds(
    Profile, st.floats(0, 100), st.floats(0, 1000), st.integers(1, 32), st.floats(0, 1e5), st.booleans()
)


@st.composite
def networks(draw: st.DrawFn) -> list[HostedSpan]:
    """Servers that say all that servers can say."""
    return [
        HostedSpan(
            span.peer_id,
            span.start,
            span.end,
            span.steps_per_s,
            draw(st.dictionaries(st.sampled_from([1, 4, 16]), st.floats(0, 1e4))),
            draw(st.none() | st.floats(0, 1e5)),
            draw(st.integers(0, 40)),
            draw(RTTS),
            draw(st.none() | st.floats(0, 1e9)),
            draw(st.none() | st.floats(0, 1e9)),
            draw(st.floats(0, 10)),
        )
        for span in draw(snapshots(speeds=st.floats(0.0, 1000)))
    ]


def all_routes(spans: list[HostedSpan], start: int, end: int) -> list[tuple[Leg, ...]]:
    """Every way to give every block to one of its hosts."""
    hosts = [[span.peer_id for span in spans if span.start <= block < span.end] for block in range(start, end)]
    routes = []
    for way in itertools.product(*hosts):
        legs, block = [], start
        for peer_id, blocks in itertools.groupby(way):
            length = len(list(blocks))
            legs.append(Leg(peer_id, block, block + length))
            block += length
        routes.append(tuple(legs))
    return routes


@given(networks(), ranges(), LINKS, WORK, st.sampled_from([0.0, 0.05, 0.5]), st.text(max_size=3))
@settings(quick, max_examples=100)
def test_with_links_that_all_differ_no_route_takes_less_time(
    spans: list[HostedSpan], blocks: tuple[int, int], links: ClientLinks, work: Profile, tolerance: float, salt: str
) -> None:
    route = find_route(spans, *blocks, links=links, profile=work, tolerance=tolerance, salt=salt)
    assert (route is None) == bool(uncovered_blocks(spans, *blocks))
    if route is None:
        return
    best = min(route_seconds(one, spans, links=links, profile=work) for one in all_routes(spans, *blocks))
    assert least_seconds(spans, *blocks, links=links, profile=work) == pytest.approx(best, rel=1e-9, abs=1e-12)
    assert route_seconds(route, spans, links=links, profile=work) <= best * (1 + tolerance + 1e-9) + 1e-12


@given(networks(), ranges(), LINKS, WORK, st.integers(0, 4))
@settings(quick, max_examples=100)
def test_one_more_server_never_makes_the_best_route_worse(
    spans: list[HostedSpan], blocks: tuple[int, int], links: ClientLinks, work: Profile, absent: int
) -> None:
    fewer = [span for index, span in enumerate(spans) if index != absent]
    assert least_seconds(spans, *blocks, links=links, profile=work) <= least_seconds(
        fewer, *blocks, links=links, profile=work
    ) * (1 + 1e-12)


@given(snapshots(), ranges(), st.sets(st.sampled_from(PEERS)), st.text(max_size=3))
@quick
def test_blocks_of_pinned_servers_are_given_to_nobody_else(
    spans: list[HostedSpan], blocks: tuple[int, int], pinned: set[str], salt: str
) -> None:
    route = find_route(spans, *blocks, pinned=pinned, salt=salt)
    assert (route is None) == bool(uncovered_blocks(spans, *blocks))
    by_peer = {span.peer_id: span for span in spans}
    for leg in route or ():
        for block in range(leg.start, leg.end):
            hosts = {peer_id for peer_id in pinned & by_peer.keys() if by_peer[peer_id].start <= block}
            hosts = {peer_id for peer_id in hosts if block < by_peer[peer_id].end}
            assert leg.peer_id in hosts or not hosts


def test_a_route_stays_in_the_client_s_region_though_the_other_s_servers_are_a_little_faster() -> None:
    near, far = 0.002, 0.080
    spans = [
        HostedSpan("here 1", 0, 2, 100.0, rtts_s={"here 2": near, "there 2": far}),
        HostedSpan("here 2", 2, 4, 100.0, rtts_s={"here 1": near, "there 1": far}),
        HostedSpan("there 1", 0, 2, 130.0, rtts_s={"there 2": near, "here 2": far}),
        HostedSpan("there 2", 2, 4, 130.0, rtts_s={"there 1": near, "here 1": far}),
    ]
    links = ClientLinks({"here 1": near, "there 1": far})
    links = with_estimates(links, spans)
    assert links.rtts_s["here 2"] == near and links.rtts_s["there 2"] == far  # by the triangle
    for salt in range(20):
        route = find_route(spans, 0, 4, links=links, profile=PROFILES["interactive"], tolerance=0.05, salt=str(salt))
        assert route == (Leg("here 1", 0, 2), Leg("here 2", 2, 4))
    route = find_route(spans[:1] + spans[2:], 0, 4, links=links, profile=PROFILES["interactive"])
    assert route == (Leg("there 1", 0, 2), Leg("there 2", 2, 4))  # rather than two changes of region


def test_the_best_route_depends_on_what_the_session_does() -> None:
    quick_answers = HostedSpan("near", 0, 4, 100.0, prefill_tokens_per_s=200.0)
    quick_reader = HostedSpan("far", 0, 4, 100.0, prefill_tokens_per_s=20_000.0)
    links = ClientLinks({"near": 0.005, "far": 0.050})
    chosen = {
        name: find_route([quick_answers, quick_reader], 0, 4, links=links, profile=profile)
        for name, profile in PROFILES.items()
    }
    assert chosen["interactive"] == (Leg("near", 0, 4),)
    assert chosen["long prompt"] == chosen["training"] == (Leg("far", 0, 4),)


def test_a_batch_goes_where_batches_are_fast() -> None:
    alone = HostedSpan("alone", 0, 4, 120.0, {1: 120.0, 16: 130.0})
    together = HostedSpan("together", 0, 4, 100.0, {1: 100.0, 16: 900.0})
    one, many = Profile(batch=1), Profile(batch=16)
    assert find_route([alone, together], 0, 4, profile=one) == (Leg("alone", 0, 4),)
    assert find_route([alone, together], 0, 4, profile=many) == (Leg("together", 0, 4),)


def test_a_thin_line_is_avoided_by_those_who_send_much() -> None:
    thin = HostedSpan("thin", 0, 4, 110.0, upload_bytes_per_s=1e5)
    wide = HostedSpan("wide", 0, 4, 100.0, upload_bytes_per_s=1e8)
    sends_much = Profile(steps=100, prompt_positions=4000, position_bytes=16_384)
    assert find_route([thin, wide], 0, 4, profile=Profile(steps=100)) == (Leg("thin", 0, 4),)
    assert find_route([thin, wide], 0, 4, profile=sends_much) == (Leg("wide", 0, 4),)


# herds


def test_routes_that_are_as_good_are_taken_in_proportion_to_what_their_servers_bear() -> None:
    bears = {"small": 100.0, "medium": 200.0, "large": 400.0}
    spans = [HostedSpan(name, 0, 4, 100.0, {1: 100.0, 8: most}) for name, most in bears.items()]
    chosen = Counter(
        route[0].peer_id for salt in range(2000) if (route := find_route(spans, 0, 4, tolerance=0.05, salt=str(salt)))
    )
    for name, most in bears.items():
        assert chosen[name] / 2000 == pytest.approx(most / sum(bears.values()), rel=0.15)


@pytest.mark.parametrize("kinds", [(100.0,), (100.0, 200.0), (100.0, 150.0, 300.0)])
def test_thirty_two_clients_load_eight_servers_in_proportion_to_what_they_bear(kinds: tuple[float, ...]) -> None:
    speeds = {f"peer{index}": kinds[index % len(kinds)] for index in range(8)}
    load = Counter[str]()
    for client in range(32):
        spans = [HostedSpan(peer_id, 0, 4, speed, sessions=load[peer_id]) for peer_id, speed in speeds.items()]
        route = find_route(spans, 0, 4, tolerance=0.05, salt=str(client))
        assert route is not None and len(route) == 1
        load[route[0].peer_id] += 1
    for peer_id, speed in speeds.items():
        assert load[peer_id] == pytest.approx(32 * speed / sum(speeds.values()), rel=0.25, abs=0.5)  # whole sessions


def test_where_links_take_most_of_the_time_load_is_still_in_proportion() -> None:
    speeds = {f"peer{index}": [2000.0, 4000.0][index % 2] for index in range(8)}
    links = ClientLinks({peer_id: 0.1 for peer_id in speeds})
    load = Counter[str]()
    for client in range(48):
        spans = [HostedSpan(peer_id, 0, 4, speed, sessions=load[peer_id]) for peer_id, speed in speeds.items()]
        route = find_route(spans, 0, 4, links=links, tolerance=0.05, salt=str(client))
        assert route is not None
        load[route[0].peer_id] += 1
    for peer_id, speed in speeds.items():
        assert load[peer_id] == pytest.approx(48 * speed / sum(speeds.values()), rel=0.25)


def test_being_nearly_as_good_is_no_reason_to_change_servers_more_often() -> None:
    spans = [HostedSpan(f"peer{index}", 0, 30, 10 + 0.05 * index) for index in range(8)]
    routes = [find_route(spans, 0, 30, tolerance=0.05, salt=str(salt)) for salt in range(100)]
    assert all(route is not None and len(route) == 1 for route in routes)
    assert len(set(routes)) == 8


# changing


def test_a_session_leaves_a_way_that_works_only_for_one_that_repays_the_replay() -> None:
    assert worth_rerouting(present_s=60, best_s=20, replay_s=5)
    assert not worth_rerouting(present_s=60, best_s=50, replay_s=0)  # estimates are not that good
    assert not worth_rerouting(present_s=60, best_s=20, replay_s=30)
    assert not worth_rerouting(present_s=1, best_s=math.inf, replay_s=math.inf)
