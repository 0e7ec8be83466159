"""What a server makes of the others' announcements before it decides to move."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from swarm.dht import Announcement, State
from swarm.placement import Move, Urgency
from swarm.server.surroundings import comparable, hostings, leaves_enough, under_way

BLOCKS = 12


def server(name: str, start: int, end: int, state: State = State.ONLINE, **changes: object) -> Announcement:
    fields = {
        "peer_id": name, "model": "ab" * 32, "state": state, "num_blocks": BLOCKS, "start": start, "end": end,
        "dtype": "float32", "throughput": 10.0, "free_kv_tokens": 7, "version": "0", "issued_at": time.time(),
    }  # fmt: skip
    return Announcement.model_validate({**fields, **changes})


def move(old: tuple[int, int], new: tuple[int, int], name: str = "me") -> Move:
    return Move(name, old, new, Urgency.SPEED, 1.0, 10.0, 10.0)


def test_a_server_that_does_not_know_its_speed_is_taken_to_be_as_fast_as_the_others() -> None:
    others = [server("1", 0, 4), server("2", 0, 8, throughput=10.0), server("3", 4, 8, State.JOINING, throughput=0.0)]
    assert [one.steps_per_s for one in hostings(others)] == [10.0, 10.0, pytest.approx((40 + 80) / 2 / 4)]


def test_who_drains_counts_as_such_and_who_has_left_not_at_all() -> None:
    found = hostings([server("1", 0, 4, State.DRAINING), server("2", 0, 4, State.OFFLINE), server("3", 0, 4)])
    assert [(one.peer_id, one.is_draining) for one in found] == [("1", True), ("3", False)]


def test_servers_of_another_precision_are_no_substitute() -> None:
    same, other = server("1", 0, 4), server("2", 0, 4, quantization="int8")
    assert comparable([same, other], BLOCKS, "float32") == [same]


@pytest.mark.parametrize(
    ("state", "start", "is_under_way"),
    [
        (State.ONLINE, 0, True),
        (State.DRAINING, 0, True),
        (State.JOINING, 4, True),
        (State.ONLINE, 4, False),
        (State.ONLINE, 8, False),
    ],
)
def test_a_claim_is_over_once_its_owner_serves_elsewhere(state: State, start: int, is_under_way: bool) -> None:
    claims = [move((0, 4), (4, 8), "1"), move((0, 4), (4, 8), "gone")]
    assert under_way(claims, [server("1", start, start + 4, state)]) == claims[:is_under_way]


WHOLE = [server("a", 0, 6), server("b", 6, 12)]


def test_who_is_needed_by_nobody_may_go() -> None:
    assert leaves_enough(move((0, 4), (6, 10)), WHOLE, BLOCKS)


@pytest.mark.parametrize("state", [State.JOINING, State.DRAINING])
def test_who_is_loading_or_leaving_is_no_substitute(state: State) -> None:
    assert not leaves_enough(move((0, 4), (6, 10)), [server("a", 0, 6, state), WHOLE[1]], BLOCKS)


def test_a_block_that_only_the_mover_serves_is_not_interrupted_while_clients_need_it() -> None:
    others = [server("a", 0, 4), server("b", 6, 12)]
    assert not leaves_enough(move((4, 8), (5, 9)), others, BLOCKS)
    assert not leaves_enough(move((3, 7), (2, 6)), [*others, server("c", 6, 7)], BLOCKS)


def test_who_hosts_another_part_of_the_same_keeps_what_nobody_else_serves() -> None:
    def focus(new: tuple[int, int]) -> Move:
        return replace(move((0, 8), new), is_focus=True)

    others = [server("a", 0, 6, State.JOINING), server("b", 4, 8)]
    assert leaves_enough(focus((0, 4)), others, BLOCKS)
    assert not leaves_enough(focus((2, 8)), others, BLOCKS)


def test_where_nobody_gets_through_anyway_only_what_is_given_up_needs_another_server() -> None:
    others = [server("a", 0, 4), server("b", 8, 12)]  # 7 is missing
    assert leaves_enough(move((3, 7), (4, 8)), others, BLOCKS)
    assert not leaves_enough(move((3, 7), (5, 9)), others, BLOCKS)
