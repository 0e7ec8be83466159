"""Whether a server should host other blocks than it does, and whose turn it is to move."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np

from swarm.placement.coverage import Counts, Coverage, Flags, Quality
from swarm.placement.hosting import Hosting, Span
from swarm.placement.join import best_of
from swarm.placement.tiles import tile_starts


class Urgency(IntEnum):
    """What a move is good for."""

    SPEED = 0
    SECOND_SERVER = 1
    """A block that has one server gets a second."""
    FIRST_SERVER = 2
    """A block that has none gets one."""


@dataclass(frozen=True)
class MovePolicy:
    """What moves cost, and how much more they must bring."""

    away_s: float = 60.0
    """Seconds for which the server hosts nothing: draining and loading."""
    horizon_s: float = 900.0
    """For so long a better placement is expected to stay better."""
    margin: float = 2.0
    """A move must win so many times the steps that are lost while the server is away."""
    least_gain: float = 0.5
    """It must raise the bottleneck by this share of what such a span adds to the mean block, at least; that of a slow
    server by this share of what it would add if the server were as fast as others."""
    least_share: float = 0.02
    """And by this share of what it is: in a large swarm no move of one server is worth the trouble of its sessions, and
    the next that joins does as much good without."""
    least_doubled: float = 0.25
    """A move only to give blocks their second server must do so for this share of the model, at least. Simulated swarms
    of 10 servers were no more often without a block when they moved for fewer."""
    at_once: float = 0.05
    """So many of all servers may be moving at the same time; one at least."""


@dataclass(frozen=True)
class Move:
    """A server gives up one span for another."""

    peer_id: str
    old: Span
    new: Span
    urgency: Urgency
    gain: float
    """By how many steps per second the swarm becomes faster."""
    steps_per_s: float
    """Through the span, of this server."""

    @property
    def reason(self) -> str:
        """For people."""
        where = f"blocks {self.new[0]} to {self.new[1] - 1}"
        match self.urgency:
            case Urgency.FIRST_SERVER:
                return f"{where}: some have no server"
            case Urgency.SECOND_SERVER:
                return f"{where}: some have a single server"
        return f"{where} are the slowest: {self.gain:.3g} steps/s more for everybody"


def wanted_move(
    me: Hosting, others: Iterable[Hosting], num_blocks: int, policy: MovePolicy = MovePolicy()
) -> Move | None:
    """The move of `me` that makes the swarm better by more than it costs; None if there is none.

    It never takes the last server from a block, nor the second but to give another block its first.

    Args:
        others: who is there, or joining, with what they claim to move to.
    """
    there = sorted((one for one in others if one.peer_id != me.peer_id), key=lambda one: one.peer_id)
    return wanted_over(me, Coverage.of(there, num_blocks), policy, there)


def wanted_over(
    me: Hosting, coverage: Coverage, policy: MovePolicy = MovePolicy(), others: Sequence[Hosting] = ()
) -> Move | None:
    """Likewise; `coverage` is that of all others, who need be named only if `me` knows its ways to them."""
    if _is_of_no_account(me, coverage, policy):
        return None
    allowed = _allowed_starts(me, coverage)
    if not allowed.any():
        return None
    qualities = coverage.qualities_with(me.length, me.steps_per_s)
    tiles = tile_starts(me.length, coverage.num_blocks)
    start = best_of(qualities, me.length, others, me.rtts_s, allowed, preferred=tiles)
    stay, there = qualities[me.start], qualities[start]
    urgency = _urgency(stay, there, policy.least_doubled * coverage.num_blocks)
    if urgency is None:
        return None
    if urgency is Urgency.SPEED and not _is_worth_it(stay, there, coverage.quality(), me, coverage, policy):
        return None
    gain = there.bottleneck - stay.bottleneck
    return Move(me.peer_id, me.span, (start, start + me.length), urgency, gain, me.steps_per_s)


def may_move(
    move: Move, claims: Iterable[Move], hostings: Iterable[Hosting], num_blocks: int, policy: MovePolicy = MovePolicy()
) -> bool:
    """Whether `move` may begin now, of all that are claimed at this time.

    Claims have an order that is the same for everybody: the most urgent first. A move may begin if it is among the
    first few, and would still be wanted, and harm nobody, when all those before it have left where they are and arrived
    where they go.

    Args:
        claims: of others; what their owners say is checked by these themselves.
        hostings: everybody, the mover as well.
    """
    there = {one.peer_id: one for one in hostings}
    me = there.pop(move.peer_id, None)
    if me is None:
        return False
    others = sorted(there.values(), key=lambda one: one.peer_id)
    believed = [one for one in claims if one.peer_id in there and there[one.peer_id].span == one.old]
    return may_move_over(move, me, believed, Coverage.of(others, num_blocks), len(there) + 1, policy, others)


def may_move_over(
    move: Move,
    me: Hosting,
    claims: Iterable[Move],
    coverage: Coverage,
    servers: int,
    policy: MovePolicy = MovePolicy(),
    others: Sequence[Hosting] = (),
) -> bool:
    """Likewise.

    Args:
        claims: by servers that host what they claim to leave.
        coverage: that of all others.
        servers: how many there are.
        others: need be named only if `me` knows its ways to them.
    """
    before = [one for one in claims if one.peer_id != move.peer_id and goes_before(one, move)]
    if len(before) >= max(1, int(policy.at_once * servers)):
        return False
    meanwhile = coverage.copy()
    for claim in before:
        meanwhile.remove(claim.old, claim.steps_per_s)
    if not _allowed_starts(me, meanwhile)[move.new[0]]:
        return False
    for claim in before:
        meanwhile.add(claim.new, claim.steps_per_s)
    gone_to = {claim.peer_id: claim.new for claim in before}
    arrived = [
        replace(one, start=gone_to[one.peer_id][0], end=gone_to[one.peer_id][1]) if one.peer_id in gone_to else one
        for one in others
    ]
    again = wanted_over(me, meanwhile, policy, arrived)
    return again is not None and again.new == move.new


def goes_before(one: Move, other: Move) -> bool:
    """Whether `one` comes first, of two moves that are claimed at the same time."""
    return _order(one) < _order(other)


def _is_of_no_account(me: Hosting, coverage: Coverage, policy: MovePolicy) -> bool:
    """Whether no move can be worth it, wherever to: for swarms of thousands, whose servers look every minute."""
    enough = policy.least_share * float(coverage.steps_per_s.min())
    return bool(coverage.servers.min() >= 2) and coverage.gains_at_most(me.steps_per_s) < enough


def _allowed_starts(me: Hosting, coverage: Coverage) -> Flags:
    """Where `me` could go without taking from any block its last server, or its second without need; ``[starts]``.

    While it loads, it serves nothing, also not those blocks that it hosts before and after. That does no harm only
    where nobody gets through anyway, because some block has no server.
    """
    servers, starts = coverage.servers, coverage.num_blocks - me.length + 1
    first = np.arange(starts)

    def keeps(blocks: Counts) -> Flags:
        kept: Flags = (first <= blocks.min()) & (blocks.max() < first + me.length)
        return kept

    elsewhere: Flags = first != me.start
    only_mine = np.flatnonzero(servers[me.start : me.end] == 0) + me.start
    without = np.convolve(servers == 0, np.ones(me.length), "valid")
    rescues: Flags = elsewhere & (without > len(only_mine))
    if len(only_mine):
        return rescues & keeps(only_mine)
    if rescues.any():
        return rescues
    shared = np.flatnonzero(servers[me.start : me.end] == 1) + me.start
    return elsewhere & keeps(shared) if len(shared) else elsewhere


def _urgency(stay: Quality, there: Quality, least_doubled: float) -> Urgency | None:
    if there.uncovered != stay.uncovered:
        return Urgency.FIRST_SERVER if there.uncovered > stay.uncovered else None
    if there.single < stay.single:
        return None
    if there.single > stay.single and there.single - stay.single >= least_doubled:
        return Urgency.SECOND_SERVER
    return Urgency.SPEED if there.bottleneck > stay.bottleneck else None


def _is_worth_it(
    stay: Quality, there: Quality, without: Quality, me: Hosting, coverage: Coverage, policy: MovePolicy
) -> bool:
    gain = there.bottleneck - stay.bottleneck
    lost = max(stay.bottleneck - without.bottleneck, 0.0) * policy.away_s
    adds = max(me.steps_per_s, coverage.usual_steps_per_s()) * me.length / coverage.num_blocks
    least = max(policy.least_gain * adds, policy.least_share * stay.bottleneck)
    return gain >= least and gain * policy.horizon_s >= policy.margin * lost


def _order(move: Move) -> tuple[float, float, bytes]:
    return -move.urgency, -move.gain, hashlib.sha256(move.peer_id.encode()).digest()
