"""Whether a server should host other blocks than it does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum

import numpy as np

from swarm.placement.coverage import Counts, Coverage, Flags, Quality
from swarm.placement.focus import FocusPolicy, better_focus
from swarm.placement.hosting import Hosting, Loaded, Span
from swarm.placement.join import best_of
from swarm.placement.tiles import tile_starts


class Urgency(IntEnum):
    """What a change is good for."""

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
    least_share: float = 0.1
    """And by this share of what it is: for less, a change of focus does, or the next server that joins, and no session
    has to be moved."""
    least_doubled: float = 0.25
    """A move only to give blocks their second server must do so for this share of the model, at least. Simulated swarms
    of 10 servers were no more often without a block when they moved for fewer."""
    at_once: float = 0.05
    """So many of all servers may be changing at the same time; one at least."""
    focus: FocusPolicy = field(default_factory=FocusPolicy)
    """What is enough to host another part of what is loaded already, for which nobody waits."""


@dataclass(frozen=True)
class Move:
    """A server gives up one span for another, which it has to load, or (a change of focus) has loaded already."""

    peer_id: str
    old: Span
    new: Span
    urgency: Urgency
    gain: float
    """By how many steps per second the swarm becomes faster."""
    steps_per_s: float
    """Through the span that it gives up, of this server."""
    new_steps_per_s: float
    """Through the other one."""
    is_focus: bool = False
    """Nothing has to be loaded."""

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
    me: Hosting,
    others: Iterable[Hosting],
    num_blocks: int,
    policy: MovePolicy = MovePolicy(),
    loaded: Loaded | None = None,
) -> Move | None:
    """The move of `me` that makes the swarm better by more than it costs; None if there is none.

    It never takes the last server from a block, nor the second but to give another block its first.

    Args:
        others: who is there, or joining, with what they claim to move to.
        loaded: what `me` has loaded, of which it may host any part; None: what it hosts, and no less.
    """
    there = sorted((one for one in others if one.peer_id != me.peer_id), key=lambda one: one.peer_id)
    return wanted_over(me, Coverage.of(there, num_blocks), policy, there, loaded)


def wanted_over(
    me: Hosting,
    coverage: Coverage,
    policy: MovePolicy = MovePolicy(),
    others: Sequence[Hosting] = (),
    loaded: Loaded | None = None,
) -> Move | None:
    """Likewise; `coverage` is that of all others, who need be named only if `me` knows its ways to them."""
    focus = _wanted_focus(me, loaded, coverage, policy) if loaded is not None else None
    if focus is not None and focus.urgency is Urgency.FIRST_SERVER:
        return focus
    move = _wanted_load(me, whole(me, loaded), coverage, policy, others)
    return move if move is not None and (focus is None or move.urgency > focus.urgency) else focus


def whole(me: Hosting, loaded: Loaded | None) -> Hosting:
    """`me` as it would be if it hosted all that it has loaded."""
    if loaded is None or loaded.span == me.span:
        return me
    steps_per_s = loaded.capacity.steps_per_s(loaded.length)
    return replace(me, start=loaded.start, end=loaded.end, steps_per_s=steps_per_s)


def _wanted_focus(me: Hosting, loaded: Loaded, coverage: Coverage, policy: MovePolicy) -> Move | None:
    found = better_focus(me, loaded, coverage, policy.focus)
    if found is None:
        return None
    focus, now = found
    urgency = _urgency(now, focus.quality, least_doubled=1)
    assert urgency is not None
    gain = focus.quality.bottleneck - now.bottleneck
    return Move(me.peer_id, me.span, focus.span, urgency, gain, me.steps_per_s, focus.steps_per_s, is_focus=True)


def _wanted_load(
    now: Hosting, me: Hosting, coverage: Coverage, policy: MovePolicy, others: Sequence[Hosting]
) -> Move | None:
    """A move to blocks that have to be loaded.

    Args:
        now: what is hosted at the moment.
        me: what could be hosted without a move.
    """
    if _is_of_no_account(me, coverage, policy):
        return None
    allowed = allowed_starts(me, coverage)
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
    return Move(
        me.peer_id, now.span, (start, start + me.length), urgency, gain, now.steps_per_s, me.steps_per_s
    )  # fmt: skip


def _is_of_no_account(me: Hosting, coverage: Coverage, policy: MovePolicy) -> bool:
    """Whether no move can be worth it, wherever to: for swarms of thousands, whose servers look every minute."""
    enough = policy.least_share * float(coverage.steps_per_s.min())
    return bool(coverage.servers.min() >= 2) and coverage.gains_at_most(me.steps_per_s) < enough


def allowed_starts(me: Hosting, coverage: Coverage) -> Flags:
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
