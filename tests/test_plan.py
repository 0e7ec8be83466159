"""The plan fits the memory that was given; a refusal says what is needed, and what would fit."""

from __future__ import annotations

import argparse
import re
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from swarm.commands.server import parse_blocks, parse_size
from swarm.errors import InsufficientMemory
from swarm.server.plan import (
    MAX_DEFAULT_KV_TOKENS,
    MIB,
    MIN_KV_TOKENS,
    PROCESS_BYTES,
    WORKING_BYTES,
    MemoryPlan,
    make_plan,
    size,
)

quick = settings(deadline=None, max_examples=200)
PROGRAM = PROCESS_BYTES + WORKING_BYTES
GIB = 1024**3


@st.composite
def wishes(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of make_plan: any model, any machine, any wish of its owner."""
    block_bytes = draw(st.lists(st.integers(1, 300 * MIB), min_size=1, max_size=12))
    start = draw(st.integers(0, len(block_bytes) - 1))
    span = (start, draw(st.integers(start + 1, len(block_bytes))))
    return {
        "block_bytes": block_bytes,
        "kv_bytes_per_block": draw(st.integers(1, 200_000)),
        "memory_bytes": draw(st.integers(0, 6 * GIB)),
        "memory_from": "--memory",
        "blocks": draw(st.none() | st.just(span)),
        "num_blocks": draw(st.none() | st.integers(1, len(block_bytes))),
        "kv_tokens": draw(st.none() | st.integers(1, 100_000)),
        "kept_bytes_per_position": draw(st.just(0) | st.integers(1, 50_000)),
        "window_blocks": draw(st.integers(0, 3)),
    }


def refusal(**wish: Any) -> str:
    with pytest.raises(InsufficientMemory) as caught:
        make_plan(**{"memory_from": "--memory", **wish})
    return str(caught.value)


def needed(message: str) -> int:
    match = re.search(r"need (\d+(?:\.\d+)? (?:[KMG]i)?B) ", message)
    assert match is not None, message
    return parse_size(match[1])


@given(wishes())
@quick
def test_a_plan_never_exceeds_the_memory_and_is_what_the_owner_wants(wish: dict[str, Any]) -> None:
    try:
        plan = make_plan(**wish)
    except InsufficientMemory as error:
        assert "--memory" in str(error) and "only" in str(error)
        return
    assert plan.total_bytes <= wish["memory_bytes"]
    assert 1 <= plan.num_blocks <= len(wish["block_bytes"])
    per_token = plan.kv_bytes_per_token + wish["kept_bytes_per_position"]
    assert plan.total_bytes == PROGRAM + plan.weight_bytes + plan.kv_tokens * per_token
    assert plan.kv_bytes_per_token == plan.num_blocks * wish["kv_bytes_per_block"]
    if wish["blocks"] is not None:
        assert plan.num_blocks == wish["blocks"][1] - wish["blocks"][0]
        assert plan.offloaded_blocks or plan.weight_bytes == sum(wish["block_bytes"][slice(*wish["blocks"])])
    elif wish["num_blocks"] is not None:
        assert plan.num_blocks == wish["num_blocks"]
    assert plan.kv_tokens == wish["kv_tokens"] or MIN_KV_TOKENS <= plan.kv_tokens <= MAX_DEFAULT_KV_TOKENS


@given(wishes())
@quick
def test_only_what_does_not_fit_is_offloaded_and_what_stays_leaves_room_for_the_window(wish: dict[str, Any]) -> None:
    try:
        plan = make_plan(**wish)
    except InsufficientMemory:
        return
    if not plan.offloaded_blocks:
        assert plan.window_blocks == 0
        return
    assert plan.window_blocks == wish["window_blocks"] < plan.offloaded_blocks < plan.num_blocks
    held = plan.num_blocks - plan.offloaded_blocks + plan.window_blocks
    assert plan.weight_bytes == held * plan.block_bytes
    least = (wish["kv_tokens"] or MIN_KV_TOKENS) * (plan.kv_bytes_per_token + wish["kept_bytes_per_position"])
    assert held == wish["window_blocks"] + 1 or PROGRAM + plan.weight_bytes + least <= wish["memory_bytes"]
    assert PROGRAM + plan.weight_bytes + plan.block_bytes + least > wish["memory_bytes"], "one more would have fitted"
    refusal(**{**wish, "num_blocks": plan.num_blocks, "window_blocks": 0})


@given(wishes())
@quick
def test_wherever_a_joiner_ends_up_its_blocks_fit(wish: dict[str, Any]) -> None:
    """Which span it will be is not known when the plan is made."""
    assume(wish["blocks"] is None)
    try:
        plan = make_plan(**wish)
    except InsufficientMemory:
        return
    if plan.offloaded_blocks:
        assert plan.block_bytes == max(wish["block_bytes"])
        return
    spans = [wish["block_bytes"][start : start + plan.num_blocks] for start in range(len(wish["block_bytes"]))]
    assert all(PROGRAM + sum(span) + plan.kv_bytes + plan.kept_bytes <= wish["memory_bytes"] for span in spans)


@given(wishes())
@quick
def test_as_many_blocks_are_hosted_as_fit(wish: dict[str, Any]) -> None:
    wish["blocks"] = wish["num_blocks"] = None
    try:
        count = make_plan(**wish).num_blocks
    except InsufficientMemory:
        count = 0
    if count < len(wish["block_bytes"]):
        refusal(**{**wish, "num_blocks": count + 1})


@given(wishes())
@quick
def test_the_memory_that_a_refusal_asks_for_is_enough_and_little_more_than_enough(wish: dict[str, Any]) -> None:
    try:
        make_plan(**wish)
    except InsufficientMemory as error:
        asked = needed(str(error))
    else:
        return
    wish["num_blocks"] = wish["num_blocks"] or 1
    make_plan(**{**wish, "memory_bytes": asked})
    refusal(**{**wish, "memory_bytes": int(asked * 0.9)})
    assert asked > wish["memory_bytes"]


@given(wishes())
@quick
def test_the_number_of_blocks_that_a_refusal_proposes_fits_and_one_more_does_not(wish: dict[str, Any]) -> None:
    try:
        make_plan(**wish)
    except InsufficientMemory as error:
        match = re.search(r"--num-blocks (\d+)\.", str(error))
    else:
        return
    proposed = int(match[1]) if match else 0
    if match:
        make_plan(**{**wish, "blocks": None, "num_blocks": proposed})
    refusal(**{**wish, "blocks": None, "num_blocks": proposed + 1})


@given(wishes(), st.integers(1, 40), st.integers(1, 200 * MIB))
@quick
def test_experts_get_the_room_that_the_least_cache_leaves_and_the_cache_what_they_leave(
    wish: dict[str, Any], count: int, one_bytes: int
) -> None:
    wish = {**wish, "num_blocks": wish["num_blocks"] or 1, "window_blocks": 0}
    try:
        without = make_plan(**wish)
    except InsufficientMemory:
        return
    blocks = len(wish["block_bytes"])
    plan = make_plan(**wish, expert_bytes=[count * one_bytes] * blocks, largest_expert_bytes=one_bytes)
    assert plan.total_bytes <= wish["memory_bytes"]
    assert plan.expert_bytes % one_bytes == 0
    per_token = plan.kv_bytes_per_token + plan.kept_bytes_per_token
    least = PROGRAM + plan.weight_bytes + (wish["kv_tokens"] or MIN_KV_TOKENS) * per_token
    assert plan.expert_bytes == plan.num_blocks * count * one_bytes or (
        least + plan.expert_bytes + one_bytes > wish["memory_bytes"]
    )
    spare = wish["memory_bytes"] - plan.total_bytes
    assert plan.kv_tokens in (wish["kv_tokens"], MAX_DEFAULT_KV_TOKENS) or spare < per_token
    assert plan.kv_tokens <= without.kv_tokens and plan.weight_bytes == without.weight_bytes


def test_a_refusal_says_what_is_needed_what_is_allowed_and_what_to_do() -> None:
    message = refusal(block_bytes=[100 * MIB] * 10, kv_bytes_per_block=1024, memory_bytes=870 * MIB, num_blocks=10)
    assert "10 blocks with 2,048 positions of KV cache need 1.5 GiB (of which 448.0 MiB for the program)" in message
    assert "only 870.0 MiB are allowed (--memory)" in message
    assert "4 blocks would fit: --num-blocks 4." in message
    assert "--memory" in message and "--dtype" in message


def test_a_refusal_of_a_machine_without_room_for_one_block_proposes_none() -> None:
    message = refusal(block_bytes=[100 * MIB] * 10, kv_bytes_per_block=1024, memory_bytes=470 * MIB)
    assert message.startswith("1 block with 2,048 positions") and "would fit" not in message


def test_a_refusal_of_a_long_cache_says_that_a_shorter_one_might_fit() -> None:
    room = {"block_bytes": [100 * MIB] * 4, "kv_bytes_per_block": 1024, "memory_bytes": 2000 * MIB}
    message = refusal(**room, kv_tokens=10_000_000)
    assert "with 10,000,000 positions" in message and "fewer --kv-tokens" in message
    assert "--kv-tokens" not in refusal(**{**room, "memory_bytes": 470 * MIB})


def test_a_refusal_of_one_span_counts_that_span_and_not_larger_blocks() -> None:
    message = refusal(
        block_bytes=[100 * MIB, 100 * MIB, 2000 * MIB], kv_bytes_per_block=1024, memory_bytes=570 * MIB, blocks=(0, 2)
    )
    assert needed(message) == pytest.approx(PROGRAM + 200 * MIB + 2 * 2048 * 1024, abs=MIB)


def test_blocks_that_the_owner_chose_are_weighed_one_by_one() -> None:
    plan = make_plan([10 * MIB, 20 * MIB, 90 * MIB], 1024, 4 * GIB, "--memory", blocks=(0, 2))
    assert (plan.num_blocks, plan.weight_bytes, plan.block_bytes) == (2, 30 * MIB, 20 * MIB)


def test_the_cache_is_as_long_as_the_owner_wants_or_what_is_left_within_reason() -> None:
    def kv_tokens(memory_bytes: int, wanted: int | None = None) -> int:
        return make_plan([MIB] * 2, 1024, memory_bytes, "--memory", kv_tokens=wanted).kv_tokens

    assert kv_tokens(4 * GIB, 5) == 5
    assert kv_tokens(4 * GIB) == MAX_DEFAULT_KV_TOKENS
    assert kv_tokens(PROGRAM + 2 * MIB + 10 * MIB) == 5 * 1024


def test_a_plan_reads_as_a_table_that_adds_up() -> None:
    lines = make_plan([20 * MIB] * 30, 1536, 1070 * MIB, "--memory").lines()
    assert [re.sub(r"\s+", " ", line.strip()) for line in lines] == [
        "memory allowed 1.0 GiB --memory",
        "program, buffers 448.0 MiB torch, p2pd, activations in flight",
        "weights 540.0 MiB 27 of 30 blocks",
        "KV cache, at most 82.0 MiB 2,073 positions, 1.5 KiB per block",
        "total, at most 1.0 GiB",
    ]


def test_what_is_kept_of_activations_is_part_of_the_plan_and_leaves_less_for_the_cache() -> None:
    room = {"block_bytes": [MIB] * 2, "kv_bytes_per_block": 1024, "memory_bytes": PROGRAM + 2 * MIB + 12 * MIB}
    without = make_plan(**room, memory_from="--memory")
    plan = make_plan(**room, memory_from="--memory", kept_bytes_per_position=1024)
    assert (without.kv_tokens, without.kept_bytes) == (6 * 1024, 0)
    assert (plan.kv_tokens, plan.kept_bytes) == (4 * 1024, 4 * MIB)
    assert plan.total_bytes == without.total_bytes == room["memory_bytes"]
    assert any(re.match(r"\s+kept activations\s+4\.0 MiB", line) for line in plan.lines())
    assert not any("kept activations" in line for line in without.lines())


def test_a_refusal_counts_what_is_kept_for_recovery() -> None:
    room = {"block_bytes": [MIB], "kv_bytes_per_block": 1024, "memory_bytes": PROGRAM + 4 * MIB, "kv_tokens": 2048}
    make_plan(**room, memory_from="--memory")
    message = refusal(**room, kept_bytes_per_position=2048)
    assert needed(message) == pytest.approx(PROGRAM + MIB + 2 * MIB + 4 * MIB, abs=MIB)


def test_a_plan_is_a_value() -> None:
    plan = make_plan([MIB], 1024, 4 * GIB, "--memory")
    assert isinstance(plan, MemoryPlan) and plan == make_plan([MIB], 1024, 4 * GIB, "--memory")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (MIB, "1.0 MiB"),
        (13 * MIB + MIB // 2, "13.5 MiB"), (GIB, "1.0 GiB"), (5000 * GIB, "5000.0 GiB"), (12, "12 B"),
        (2048, "2.0 KiB"), (3 * MIB, "3.0 MiB"), (5 * GIB, "5.0 GiB"),
        (MIB - 1, "1.0 MiB"), (MIB - 100, "1023.9 KiB"), (GIB - 1, "1.0 GiB"), (GIB - MIB // 10, "1023.9 MiB"),
    ],
)  # fmt: skip
def test_sizes_are_written_as_people_write_them(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(1024, "1.0 KiB"), (1025, "1.1 KiB"), (MIB - 100, "1.0 MiB"), (MIB + 1, "1.1 MiB"), (GIB - 1, "1.0 GiB")],
)
def test_a_size_rounded_up_is_never_less(count: int, text: str) -> None:
    assert size(count, round_up=True) == text


@given(st.integers(0, 2**50), st.booleans())
@quick
def test_no_size_is_a_thousand_and_twenty_four_of_a_unit_that_has_a_larger_one(count: int, round_up: bool) -> None:
    text = size(count, round_up=round_up)
    assert float(text.split()[0]) < 1024 or text.endswith("GiB")
    assert not round_up or parse_size(text) >= count


@given(st.integers(0, 2**50))
@quick
def test_a_size_that_was_written_reads_as_nearly_the_same(count: int) -> None:
    assert parse_size(size(count)) == pytest.approx(count, rel=0.05)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0), ("77", 77), ("77B", 77), ("12GiB", 12 * GIB), ("12gib", 12 * GIB), ("12G", 12 * GIB),
        ("12GB", 12 * GIB), ("800M", 800 * MIB), ("1.5 GB", GIB * 3 // 2), (" 4 KiB ", 4096), ("2T", 2048 * GIB),
        (".5K", 512),
    ],
)  # fmt: skip
def test_sizes_are_read_as_people_write_them(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize(
    "text", ["", "GiB", ".", "1.2.3G", "-5", "-5G", "+5", "1_000", "12 apples", "12PB", "1e9", "nan", "9" * 400 + "G"]
)
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"is not a size; write e\.g\. 12GiB"):
        parse_size(text)


@pytest.mark.parametrize(("text", "blocks"), [("auto", None), ("0:15", (0, 15)), ("7:8", (7, 8)), ("00:01", (0, 1))])
def test_spans_are_read_as_people_write_them(text: str, blocks: tuple[int, int] | None) -> None:
    assert parse_blocks(text) == blocks


@pytest.mark.parametrize("text", ["", "5", "5:", ":5", "5:5", "6:5", "-1:5", "0:1:2", "a:b", "0-15", " 0:15", "0:15\n"])
def test_what_is_no_span_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a span; write A:B with A < B, such as 0:15"):
        parse_blocks(text)
