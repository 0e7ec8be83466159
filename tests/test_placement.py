"""Where a joining server goes: always within the model, first to blocks that nobody hosts, the same for all who ask."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.placement import Capacity, Coverage, Hosting, choose_span, settle
from swarm.placement.join import _turn
from swarm.placement.tiles import tile_lengths, tile_starts

quick = settings(deadline=None, max_examples=150)
SPANS = st.lists(st.tuples(st.integers(0, 19), st.integers(1, 8), st.sampled_from([0.0, 0.5, 1, 3, 40])), max_size=10)
MODEL = st.integers(1, 20)
LENGTH = st.integers(1, 25)


def hosted(spans: list[tuple[int, int, float]], num_blocks: int) -> list[Hosting]:
    """Servers named a, b, …, within the model."""
    return [
        Hosting(chr(ord("a") + number), min(start, num_blocks - 1), min(start + length, num_blocks), speed)
        for number, (start, length, speed) in enumerate(spans)
    ]


def servers_of(hostings: list[Hosting], num_blocks: int) -> list[int]:
    return [sum(one.start <= block < one.end for one in hostings) for block in range(num_blocks)]


def choices(num_blocks: int, length: int) -> list[tuple[int, int]]:
    length = min(length, num_blocks)
    return [(start, start + length) for start in range(num_blocks - length + 1)]


@given(SPANS, MODEL, LENGTH)
@quick
def test_a_span_lies_within_the_model_and_is_as_long_as_was_asked(
    spans: list[tuple[int, int, float]], num_blocks: int, length: int
) -> None:
    chosen = choose_span(hosted(spans, num_blocks), num_blocks, Capacity(length, 10.0), blocks=length)
    assert chosen in choices(num_blocks, length)


@given(SPANS, MODEL, LENGTH)
@quick
def test_as_many_blocks_as_possible_get_their_first_server_and_then_their_second(
    spans: list[tuple[int, int, float]], num_blocks: int, length: int
) -> None:
    others = hosted(spans, num_blocks)
    start, end = choose_span(others, num_blocks, Capacity(length, 10.0), blocks=length)
    servers = servers_of(others, num_blocks)

    def gets(a: int, b: int) -> tuple[int, int]:
        return servers[a:b].count(0), servers[a:b].count(1)

    assert gets(start, end) == max(gets(a, b) for a, b in choices(num_blocks, length))


@given(SPANS, MODEL, LENGTH)
@quick
def test_no_other_span_leaves_a_better_placement(
    spans: list[tuple[int, int, float]], num_blocks: int, length: int
) -> None:
    others, length = hosted(spans, num_blocks), min(length, num_blocks)
    start, end = choose_span(others, num_blocks, Capacity(length, 10.0 * length), blocks=length)

    def quality(a: int, b: int) -> tuple[int, int, float]:
        coverage = Coverage.of([*others, Hosting("me", a, b, 10.0)], num_blocks)
        return coverage.quality()

    best = max(quality(a, b) for a, b in choices(num_blocks, length))
    mine = quality(start, end)
    assert mine[:2] == best[:2]
    assert mine[2] >= 0.994 * best[2]


@given(SPANS, MODEL, LENGTH, st.randoms(use_true_random=False))
@quick
def test_who_knows_the_same_servers_chooses_the_same_span(
    spans: list[tuple[int, int, float]], num_blocks: int, length: int, random: Random
) -> None:
    others = hosted(spans, num_blocks)
    shuffled = list(others)
    random.shuffle(shuffled)
    capacity = Capacity(length, 10.0)
    assert choose_span(iter(shuffled), num_blocks, capacity) == choose_span(others, num_blocks, capacity)


@given(MODEL, LENGTH)
@quick
def test_servers_that_join_one_after_another_soon_host_everything(num_blocks: int, length: int) -> None:
    others: list[Hosting] = []
    for number in range(-(-num_blocks // min(length, num_blocks))):
        start, end = choose_span(others, num_blocks, Capacity(length, 10.0), blocks=length)
        others.append(Hosting(f"peer{number}", start, end, 1.0))
    assert min(servers_of(others, num_blocks)) >= 1


@given(SPANS, st.integers(1, 8), st.integers(1, 6))
@quick
def test_servers_that_join_at_once_settle_as_if_they_had_come_one_after_another(
    spans: list[tuple[int, int, float]], joining: int, length: int
) -> None:
    num_blocks = 12
    others = hosted(spans, num_blocks)
    first_choice = choose_span(others, num_blocks, Capacity(length, 1.0 * length), blocks=length)
    crowd = [Hosting(f"joiner {number}", *first_choice, 1.0) for number in range(joining)]
    settled = [Hosting(one.peer_id, *settle(one, crowd, others, num_blocks), 1.0) for one in crowd]
    one_after_another: list[Hosting] = []
    for _ in crowd:
        start, end = choose_span(
            [*others, *one_after_another], num_blocks, Capacity(length, 1.0 * length), blocks=length
        )
        one_after_another.append(Hosting(f"z{len(one_after_another)}", start, end, 1.0))
    assert sorted(one.span for one in settled) == sorted(one.span for one in one_after_another)


def test_a_server_that_leaves_does_not_count() -> None:
    others = [Hosting("leaving", 0, 2, 5.0, is_draining=True), Hosting("staying", 2, 4, 1.0)]
    assert choose_span(others, 4, Capacity(2, 10.0)) == (0, 2)


def test_the_slowest_blocks_get_the_next_server() -> None:
    others = [Hosting("a", 0, 4, 5.0), Hosting("b", 0, 2, 5.0), Hosting("c", 2, 4, 1.0)]
    assert choose_span(others, 4, Capacity(2, 10.0)) == (2, 4)


def test_of_equally_good_spans_the_one_with_near_neighbours_is_taken() -> None:
    others = [Hosting("near", 0, 3, 1.0), Hosting("far", 3, 6, 1.0)]
    capacity = Capacity(3, 3.0)
    assert choose_span(others, 6, capacity) == (0, 3)
    assert choose_span(others, 6, capacity, rtts_s={"near": 0.001, "far": 0.2}) == (3, 6)


def test_a_slow_server_with_much_memory_hosts_everything_only_while_it_is_needed() -> None:
    slow = Capacity(max_blocks=8, block_steps_per_s=8.0)
    assert choose_span([], 8, slow) == (0, 8)
    fast = [Hosting("a", 0, 8, 10.0), Hosting("b", 0, 8, 10.0)]
    start, end = choose_span(fast, 8, slow)
    assert (
        end - start == 2
    )  # a quarter of the model, 4 steps/s: as a half, 2 steps/s, it would be far slower than others


def test_a_fast_server_with_little_memory_hosts_what_fits() -> None:
    fast = Capacity(max_blocks=2, block_steps_per_s=1000.0)
    start, end = choose_span([Hosting("a", 0, 8, 10.0), Hosting("b", 0, 8, 10.0)], 8, fast)
    assert end - start == 2


@pytest.mark.parametrize("length", [0, -1])
def test_a_server_without_blocks_is_no_server(length: int) -> None:
    with pytest.raises(ValueError, match="at least one block"):
        choose_span([], 4, Capacity(4, 1.0), blocks=length)


def test_spans_tile_the_model() -> None:
    start, end = choose_span([], 80, Capacity(max_blocks=23, block_steps_per_s=100.0))
    assert (start, end) == (0, 20)
    assert choose_span([], 80, Capacity(max_blocks=200)) == (0, 80)


@given(st.integers(1, 200))
@quick
def test_tiles_of_every_length_cover_the_model_and_lie_within_the_longer_ones(num_blocks: int) -> None:
    longer = [(0, num_blocks)]
    for length in tile_lengths(num_blocks)[1:]:
        starts = tile_starts(length, num_blocks)
        assert starts is not None
        tiles = [(int(start), int(start) + length) for start in np.flatnonzero(starts)]
        assert {block for start, end in tiles for block in range(start, end)} == set(range(num_blocks))
        assert all(any(start >= a and end <= b for a, b in longer) for start, end in tiles)
        longer = tiles
    assert all(
        tile_starts(length, num_blocks) is None for length in set(range(1, num_blocks)) - {*tile_lengths(num_blocks)}
    )


@given(st.lists(st.integers(1, 16), min_size=5, max_size=20))
@settings(deadline=None, max_examples=30)
def test_who_joins_a_swarm_of_many_takes_a_tile(memories: list[int]) -> None:
    others = [Hosting("first", 0, 16, 1.0), Hosting("second", 0, 16, 1.0)]
    for number, fit in enumerate(memories):
        start, end = choose_span(others, 16, Capacity(fit, 16.0))
        assert end - start == max(length for length in (1, 2, 4, 8, 16) if length <= fit)
        assert start % (end - start) == 0
        others.append(Hosting(f"peer {number}", start, end, 16.0 / (end - start)))


@given(SPANS, st.integers(0, 3))
@quick
def test_a_tile_is_not_preferred_to_the_first_or_second_server_of_a_block(
    spans: list[tuple[int, int, float]], halvings: int
) -> None:
    others, length = hosted(spans, 16), 16 >> halvings
    (start, end), servers = choose_span(others, 16, Capacity(length, 10.0)), servers_of(others, 16)

    def gets(a: int, b: int) -> tuple[int, int]:
        return servers[a:b].count(0), servers[a:b].count(1)

    assert gets(start, end) == max(gets(a, b) for a, b in choices(16, end - start))


def test_those_who_join_at_once_settle_on_tiles_as_well() -> None:
    others = [Hosting(name, 0, 16, 1.0) for name in "ab"]
    others += [Hosting("c", 0, 4, 2.0), Hosting("d", 12, 16, 2.0)]
    crowd = [Hosting(f"joiner {number}", 0, 8, 1.0) for number in range(4)]
    spans = [settle(one, crowd, others, 16, tiles=True) for one in crowd]
    assert sorted(spans) == [(0, 8), (0, 8), (8, 16), (8, 16)]
    assert settle(min(crowd, key=_turn), crowd, others, 16) == (4, 12)
