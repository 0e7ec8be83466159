"""A server hosts the part of its loaded blocks that is needed most: nothing is uncovered, and it comes to an end."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.placement import Capacity, Coverage, Hosting, Loaded, Move, MovePolicy, Urgency, may_move, wanted_move
from swarm.placement.focus import FocusPolicy, better_focus
from swarm.placement.tiles import tile_lengths

NUM_BLOCKS = 12
SERVERS = st.lists(
    st.tuples(
        st.integers(0, NUM_BLOCKS - 1), st.integers(1, NUM_BLOCKS), st.sampled_from([0.5, 1, 2, 9]),
        st.integers(0, NUM_BLOCKS), st.integers(0, NUM_BLOCKS),
    ),
    min_size=1,
    max_size=8,
)  # fmt: skip
"""First block and number of those that are loaded, speed through one, and how many are left out at either end."""
quick = settings(deadline=None, max_examples=150)
Drawn = list[tuple[int, int, float, int, int]]
Swarm = list[tuple[Hosting, Loaded]]


def swarm(drawn: Drawn) -> Swarm:
    found = []
    for number, (start, length, speed, before, after) in enumerate(drawn):
        end = min(start + length, NUM_BLOCKS)
        first = min(start + before, end - 1)
        last = max(first + 1, end - after)
        hosting = Hosting(f"peer {number}", first, last, speed / (last - first))
        found.append((hosting, Loaded(start, end, Capacity(end - start, speed))))
    return found


def coverage_of(servers: Swarm) -> Coverage:
    return Coverage.of([hosting for hosting, _ in servers], NUM_BLOCKS)


def wants(servers: Swarm) -> dict[str, Move]:
    hostings = [one for one, _ in servers]
    moves = (wanted_move(one, hostings, NUM_BLOCKS, loaded=loaded) for one, loaded in servers)
    return {move.peer_id: move for move in moves if move is not None}


def carried_out(servers: Swarm, move: Move) -> Swarm:
    changed = []
    for hosting, loaded in servers:
        if hosting.peer_id == move.peer_id:
            hosting = replace(hosting, start=move.new[0], end=move.new[1], steps_per_s=move.new_steps_per_s)
            loaded = loaded if move.is_focus else Loaded(*move.new, loaded.capacity)
        changed.append((hosting, loaded))
    return changed


@given(SERVERS)
@quick
def test_a_focus_lies_within_what_is_loaded_and_makes_the_swarm_better(
    drawn: Drawn,
) -> None:
    servers = swarm(drawn)
    before, all_loaded = coverage_of(servers), {one.peer_id: loaded for one, loaded in servers}
    for move in [one for one in wants(servers).values() if one.is_focus]:
        loaded = all_loaded[move.peer_id]
        assert loaded.start <= move.new[0] < move.new[1] <= loaded.end
        assert move.new[1] - move.new[0] >= FocusPolicy().narrowest * loaded.length
        after = coverage_of(carried_out(servers, move))
        assert not ((before.servers > 0) & (after.servers == 0)).any()
        if move.urgency is not Urgency.FIRST_SERVER:
            assert not ((before.servers > 1) & (after.servers < 2)).any()
        assert after.quality() > before.quality()


@given(SERVERS)
@quick
def test_the_best_of_all_parts_is_chosen(drawn: Drawn) -> None:
    (me, loaded), *others = swarm(drawn)
    coverage, found = coverage_of(others), better_focus(me, loaded, coverage_of(others))
    lengths = [one for one in tile_lengths(NUM_BLOCKS) if loaded.length / 2 <= one < loaded.length] + [loaded.length]
    spans = [(s, s + n) for n in lengths for s in range(loaded.start, loaded.end - n + 1)]

    def covers(span: tuple[int, int], steps_per_s: float) -> tuple[tuple[int, int], float, Coverage]:
        after = coverage.copy()
        after.add(span, steps_per_s)
        quality = after.quality()
        return (quality.uncovered, quality.single), quality.bottleneck, after

    now, slowest, before = covers(me.span, me.steps_per_s)
    outcomes = {span: covers(span, loaded.capacity.steps_per_s(span[1] - span[0])) for span in spans}
    rescues = {one: out for one, out in outcomes.items() if out[0][0] > now[0]}
    allowed = {
        span: out
        for span, out in outcomes.items()
        if not ((before.servers > 0) & (out[2].servers == 0)).any()
        and (span in rescues or not ((before.servers > 1) & (out[2].servers < 2)).any())
    }
    best = max((out[:2] for out in allowed.values()), default=(now, 0.0))
    if found is None:
        assert best[0] <= now
        assert best[0] < now or best[1] <= 1.0101 * slowest or allowed[me.span][1] >= 0.995 * best[1]
    else:
        chosen = allowed[found[0].span]
        assert chosen[0] == best[0] and chosen[1] >= 0.994 * best[1]
        longer = [span for span in allowed if span[1] - span[0] > found[0].length]
        assert all(allowed[span][0] < best[0] or allowed[span][1] < 0.996 * best[1] for span in longer)


@given(SERVERS, st.randoms(use_true_random=False))
@quick
def test_all_who_may_change_at_the_same_time_uncover_nothing_whoever_of_them_has(drawn: Drawn, random: Random) -> None:
    servers, policy = swarm(drawn), MovePolicy(at_once=1.0)
    claims, hostings, all_loaded = (
        wants(servers),
        [one for one, _ in servers],
        dict((one.peer_id, loaded) for one, loaded in servers),
    )
    may = [
        move for move in claims.values()
        if may_move(move, claims.values(), hostings, NUM_BLOCKS, policy, all_loaded[move.peer_id])
    ]  # fmt: skip
    assert bool(may) == bool(claims)
    before, after = coverage_of(servers), servers
    for move in random.sample(may, random.randint(0, len(may))):
        after = carried_out(after, move)
    assert not ((before.servers > 0) & (coverage_of(after).servers == 0)).any()


@given(SERVERS, st.randoms(use_true_random=False))
@quick
def test_who_sees_the_same_swarm_decides_the_same(drawn: Drawn, random: Random) -> None:
    servers = swarm(drawn)
    shuffled = random.sample(servers, len(servers))
    assert wants(shuffled) == wants(servers)


@given(SERVERS)
@quick
def test_changes_come_to_an_end(drawn: Drawn) -> None:
    servers = swarm(drawn)
    for _ in range(40 * len(servers)):
        claims, hostings = wants(servers), [one for one, _ in servers]
        turn = [
            claims[one.peer_id] for one, loaded in servers
            if one.peer_id in claims
            and may_move(claims[one.peer_id], claims.values(), hostings, NUM_BLOCKS, loaded=loaded)
        ]  # fmt: skip
        if not turn:
            assert not claims
            return
        servers = carried_out(servers, turn[0])
    raise AssertionError("servers change for ever")


def test_who_has_more_in_memory_helps_where_it_is_slow_without_a_move() -> None:
    a, b, c = Hosting("a", 0, 12, 1.0), Hosting("b", 0, 12, 1.0), Hosting("c", 0, 6, 4.0)
    move = wanted_move(b, [a, b, c], 12, loaded=Loaded(0, 12, Capacity(12, 12.0)))
    assert move is not None and move.is_focus
    assert (move.new, move.new_steps_per_s) == ((6, 12), 2.0)


def test_a_block_without_a_server_is_hosted_at_once_by_who_has_it_in_memory() -> None:
    me, other = Hosting("me", 0, 6, 2.0), Hosting("other", 0, 6, 1.0)
    move = wanted_move(me, [me, other], 12, loaded=Loaded(0, 12, Capacity(12, 12.0)))
    assert move is not None and move.is_focus and move.urgency is Urgency.FIRST_SERVER
    assert move.new == (0, 12)
