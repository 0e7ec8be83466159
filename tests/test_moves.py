"""Moves make a swarm better, never uncover a block, come one after another, and come to an end."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.placement import Coverage, Hosting, Move, MovePolicy, Urgency, may_move, wanted_move

NUM_BLOCKS = 10
SPANS = st.lists(
    st.tuples(st.integers(0, NUM_BLOCKS - 1), st.integers(1, 6), st.sampled_from([0.0, 0.3, 1, 2, 9])),
    min_size=1,
    max_size=8,
)
quick = settings(deadline=None, max_examples=150)


def placed(spans: list[tuple[int, int, float]]) -> list[Hosting]:
    return [
        Hosting(f"peer {number}", start, min(start + length, NUM_BLOCKS), speed)
        for number, (start, length, speed) in enumerate(spans)
    ]


def wants(servers: list[Hosting]) -> dict[str, Move]:
    moves = (wanted_move(one, servers, NUM_BLOCKS) for one in servers)
    return {move.peer_id: move for move in moves if move is not None}


def carried_out(servers: list[Hosting], move: Move) -> list[Hosting]:
    return [replace(one, start=move.new[0], end=move.new[1]) if one.peer_id == move.peer_id else one for one in servers]


@given(SPANS)
@quick
def test_a_move_uncovers_nothing_and_makes_the_swarm_better(spans: list[tuple[int, int, float]]) -> None:
    servers = placed(spans)
    before = Coverage.of(servers, NUM_BLOCKS)
    for move in wants(servers).values():
        after = Coverage.of(carried_out(servers, move), NUM_BLOCKS)
        assert not ((before.servers > 0) & (after.servers == 0)).any()
        if move.urgency is not Urgency.FIRST_SERVER:
            assert not ((before.servers > 1) & (after.servers < 2)).any()
        assert after.quality() > before.quality()


@given(SPANS)
@quick
def test_all_who_may_move_at_the_same_time_uncover_nothing_even_while_they_are_away(
    spans: list[tuple[int, int, float]],
) -> None:
    servers = placed(spans)
    claims = wants(servers)
    policy = MovePolicy(at_once=1.0)
    moving = [move for move in claims.values() if may_move(move, claims.values(), servers, NUM_BLOCKS, policy)]
    assert bool(moving) == bool(claims)
    leaving = {move.peer_id for move in moving}
    before = Coverage.of(servers, NUM_BLOCKS)
    meanwhile = Coverage.of([one for one in servers if one.peer_id not in leaving], NUM_BLOCKS)
    after = servers
    for move in moving:
        after = carried_out(after, move)
    arrived = Coverage.of(after, NUM_BLOCKS)
    assert not ((before.servers > 0) & (arrived.servers == 0)).any()
    for move in moving:  # who leaves for speed leaves nobody alone with nothing
        if move.urgency is not Urgency.FIRST_SERVER:
            assert (meanwhile.servers[slice(*move.old)] > 0).all()


@given(SPANS, st.randoms(use_true_random=False))
@quick
def test_the_first_of_those_who_want_to_move_may_also_where_they_know_how_far_others_are(
    spans: list[tuple[int, int, float]], random: Random
) -> None:
    servers = [
        replace(one, rtts_s={f"peer {other}": random.choice([0.0002, 0.003, 0.02, 0.2]) for other in range(len(spans))})
        for one in placed(spans)
    ]
    claims = wants(servers)
    may = [move for move in claims.values() if may_move(move, claims.values(), servers, NUM_BLOCKS)]
    assert bool(may) == bool(claims)


@given(SPANS, st.randoms(use_true_random=False))
@quick
def test_who_sees_the_same_swarm_decides_the_same(spans: list[tuple[int, int, float]], random: Random) -> None:
    servers = placed(spans)
    shuffled = list(servers)
    random.shuffle(shuffled)
    claims = wants(servers)
    assert wants(shuffled) == claims
    turns = {name: may_move(move, claims.values(), servers, NUM_BLOCKS) for name, move in claims.items()}
    assert {
        name: may_move(move, [*claims.values()][::-1], shuffled, NUM_BLOCKS) for name, move in claims.items()
    } == turns
    assert sum(turns.values()) <= 1


@given(SPANS)
@quick
def test_moves_come_to_an_end(spans: list[tuple[int, int, float]]) -> None:
    servers = placed(spans)
    for _ in range(10 * len(servers)):
        claims = wants(servers)
        turn = [move for move in claims.values() if may_move(move, claims.values(), servers, NUM_BLOCKS)]
        if not turn:
            assert not claims
            return
        servers = carried_out(servers, turn[0])
    raise AssertionError("servers move for ever")


def test_a_block_without_a_server_is_rescued_by_one_that_is_not_needed_where_it_is() -> None:
    servers = [Hosting("a", 0, 5, 1.0), Hosting("b", 0, 5, 1.0), Hosting("c", 0, 5, 1.0)]
    move = wanted_move(servers[0], servers, NUM_BLOCKS)
    assert move is not None
    assert move.new == (5, 10)
    assert move.urgency is Urgency.FIRST_SERVER
    assert "have no server" in move.reason


def test_the_last_server_of_a_block_stays() -> None:
    servers = [Hosting("a", 0, 5, 1.0), Hosting("b", 4, 10, 1.0)]
    assert wants(servers) == {}


def test_a_small_gain_is_not_worth_the_time_away() -> None:
    servers = [Hosting(name, *span, 1.0) for name, span in zip("abcdefg", [(0, 5)] * 4 + [(5, 10)] * 3, strict=True)]
    assert wants(servers) == {}


def test_two_fast_servers_are_not_left_on_the_same_blocks() -> None:
    servers = [Hosting(name, 0, 5, 1.0) for name in "abcdef"] + [Hosting(name, 5, 10, 1.0) for name in "gh"]
    claims = wants(servers)
    assert set(claims) == set("abcdef")
    (first,) = (move for move in claims.values() if may_move(move, claims.values(), servers, NUM_BLOCKS))
    assert first.new == (5, 10)
    assert wants(carried_out(servers, first)) != {}  # 5 and 3: one more


def test_a_second_server_for_a_few_blocks_is_not_worth_a_move() -> None:
    servers = [Hosting(name, 0, 8, 1.0) for name in "abc"] + [Hosting("d", 8, 40, 5.0), Hosting("e", 8, 32, 5.0)]
    assert wanted_move(servers[0], servers, 40) is None
    move = wanted_move(servers[0], servers, 40, MovePolicy(least_doubled=0.2))
    assert move is not None
    assert (move.new, move.urgency) == ((32, 40), Urgency.SECOND_SERVER)


@given(SPANS, st.floats(0, 0.5))
@quick
def test_a_server_too_slow_to_matter_is_told_so_without_a_look_at_every_place(
    spans: list[tuple[int, int, float]], share: float
) -> None:
    servers = placed(spans)
    policy = MovePolicy(least_share=share)
    for one in servers:
        others = Coverage.of([other for other in servers if other is not one], NUM_BLOCKS)
        with_it = others.qualities_with(one.length, one.steps_per_s).bottleneck
        most = others.gains_at_most(one.steps_per_s)
        if others.servers.min() >= 1:
            assert (with_it <= others.quality().bottleneck + most * (1 + 1e-9)).all()
        move = wanted_move(one, servers, NUM_BLOCKS, policy)
        if move is not None and move.urgency is Urgency.SPEED:
            assert move.gain >= share * (with_it[one.start] if others.servers.min() >= 1 else 0.0)
