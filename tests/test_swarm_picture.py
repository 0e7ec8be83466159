"""What people see of a swarm: how many servers each block has, what that means, and what has changed."""

from __future__ import annotations

from swarm.commands.swarm_picture import changes, coverage_strip, moves_between, servers_of_blocks, verdict
from swarm.dht import Announcement, State


def server(
    name: str, start: int, end: int, state: State = State.ONLINE, loaded: tuple[int, int] | None = None
) -> Announcement:
    return Announcement(
        peer_id=name, model="0" * 64, state=state, num_blocks=70, start=start, end=end, dtype="float32", throughput=1,
        free_kv_tokens=1, version="0", issued_at=0, public_name=name, loaded=loaded,
    )  # fmt: skip


def test_only_servers_that_are_online_count() -> None:
    servers = [server("a", 0, 40), server("b", 30, 70), server("c", 0, 70, State.JOINING)]
    assert servers_of_blocks(servers, 70) == [1] * 30 + [2] * 10 + [1] * 30


def test_the_strip_has_a_digit_for_every_block() -> None:
    lines = coverage_strip([0, 1, 2, 12] + [3] * 60).plain.splitlines()
    assert lines == ["     0  012+" + "3" * 56, "    60  3333"]


def test_the_verdict_says_what_is_missing_or_how_much_can_be_lost() -> None:
    assert verdict([1, 0, 0, 2, 0]) == "INCOMPLETE: no server is online for 3 of 5 blocks: 1–2, 4"
    assert verdict([1, 2]).endswith("the loss of any one server breaks it.")
    assert verdict([4, 3]).endswith("every block has 3 or more servers; it survives the loss of any 2.")


def test_changes_are_told_one_by_one() -> None:
    before = [server("a", 0, 4), server("b", 4, 8), server("c", 0, 8)]
    after = [server("a", 0, 4, State.DRAINING), server("b", 2, 6), server("d", 0, 2, State.JOINING)]
    assert changes(before, after) == [
        "a is draining: blocks 0–3",
        "b moves from blocks 4–7 to blocks 2–5",
        "d has come: blocks 0–1, joining",
        "c is gone: blocks 0–7",
    ]
    assert moves_between(before, after) == 1
    assert changes(after, after) == []


def test_who_hosts_another_part_of_what_it_has_loaded_has_not_moved() -> None:
    before = [server("a", 0, 8), server("b", 4, 8, loaded=(0, 8))]
    after = [server("a", 4, 8, loaded=(0, 8)), server("b", 0, 8)]
    assert changes(before, after) == ["a hosts blocks 4–7 of 0–7", "b hosts blocks 0–7"]
    assert moves_between(before, after) == 0
