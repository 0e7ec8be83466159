"""Where a joining server goes: always within the model, first to blocks that nobody hosts, the same for all who ask."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.placement import choose_span

quick = settings(deadline=None, max_examples=200)
HOSTED = st.lists(st.tuples(st.integers(-3, 25), st.integers(-3, 25)), max_size=8)
MODEL = st.integers(1, 20)
LENGTH = st.integers(1, 25)


def coverage(hosted: list[tuple[int, int]], num_blocks: int) -> list[int]:
    return [sum(start <= block < end for start, end in hosted) for block in range(num_blocks)]


def choices(num_blocks: int, length: int) -> list[tuple[int, int]]:
    length = min(length, num_blocks)
    return [(start, start + length) for start in range(num_blocks - length + 1)]


@given(HOSTED, MODEL, LENGTH)
@quick
def test_a_span_lies_within_the_model_and_is_as_long_as_was_asked(
    hosted: list[tuple[int, int]], num_blocks: int, length: int
) -> None:
    assert choose_span(hosted, num_blocks, length) in choices(num_blocks, length)


@given(HOSTED, MODEL, LENGTH)
@quick
def test_a_block_that_nobody_hosts_is_taken_first(hosted: list[tuple[int, int]], num_blocks: int, length: int) -> None:
    covered = coverage(hosted, num_blocks)
    start, end = choose_span(hosted, num_blocks, length)
    if 0 in covered:
        assert 0 in covered[start:end]


@given(HOSTED, MODEL, LENGTH)
@quick
def test_as_many_uncovered_blocks_as_possible_are_taken(
    hosted: list[tuple[int, int]], num_blocks: int, length: int
) -> None:
    covered = coverage(hosted, num_blocks)
    start, end = choose_span(hosted, num_blocks, length)
    assert covered[start:end].count(0) == max(covered[a:b].count(0) for a, b in choices(num_blocks, length))


@given(HOSTED, MODEL, LENGTH)
@quick
def test_no_span_has_fewer_hosts_and_of_equals_the_first_is_taken(
    hosted: list[tuple[int, int]], num_blocks: int, length: int
) -> None:
    covered = coverage(hosted, num_blocks)
    ranked = sorted(choices(num_blocks, length), key=lambda span: (sorted(covered[slice(*span)]), span))
    assert choose_span(hosted, num_blocks, length) == ranked[0]


@given(HOSTED, MODEL, LENGTH, st.randoms(use_true_random=False))
@quick
def test_who_knows_the_same_servers_chooses_the_same_span(
    hosted: list[tuple[int, int]], num_blocks: int, length: int, random: Random
) -> None:
    shuffled = list(hosted)
    random.shuffle(shuffled)
    assert choose_span(iter(shuffled), num_blocks, length) == choose_span(hosted, num_blocks, length)


@given(MODEL, LENGTH)
@quick
def test_servers_that_join_one_after_another_soon_host_everything(num_blocks: int, length: int) -> None:
    hosted: list[tuple[int, int]] = []
    for _ in range(-(-num_blocks // min(length, num_blocks))):
        hosted.append(choose_span(hosted, num_blocks, length))
    assert min(coverage(hosted, num_blocks)) == 1 or len(hosted) * length < num_blocks


@pytest.mark.parametrize("length", [0, -1])
def test_a_server_without_blocks_is_no_server(length: int) -> None:
    with pytest.raises(ValueError, match="at least one block"):
        choose_span([], 4, length)
