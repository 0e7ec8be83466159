"""Whose turn it is to change, of several servers that want to at the same time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace

from swarm.placement.coverage import Coverage
from swarm.placement.focus import may_give_up
from swarm.placement.hosting import Hosting, Loaded
from swarm.placement.moves import Move, MovePolicy, Urgency, allowed_starts, wanted_over, whole

_USUAL = MovePolicy()


def may_move(
    move: Move,
    claims: Iterable[Move],
    hostings: Iterable[Hosting],
    num_blocks: int,
    policy: MovePolicy = _USUAL,
    loaded: Loaded | None = None,
) -> bool:
    """Whether `move` may begin now, of all that are claimed at this time.

    Claims have an order that is the same for everybody: the most urgent first. A move may begin if it is among the
    first few, and would still be wanted, and harm nobody, when all those before it have left where they are and arrived
    where they go.

    Args:
        claims: of others; what their owners say is checked by these themselves.
        hostings: everybody, the mover as well.
        loaded: by the mover, as it is given to :func:`wanted_move`.
    """
    there = {one.peer_id: one for one in hostings}
    me = there.pop(move.peer_id, None)
    if me is None:
        return False
    others = sorted(there.values(), key=lambda one: one.peer_id)
    believed = [one for one in claims if one.peer_id in there and there[one.peer_id].span == one.old]
    return may_move_over(move, me, believed, Coverage.of(others, num_blocks), len(there) + 1, policy, others, loaded)


def may_move_over(
    move: Move,
    me: Hosting,
    claims: Iterable[Move],
    coverage: Coverage,
    servers: int,
    policy: MovePolicy = _USUAL,
    others: Sequence[Hosting] = (),
    loaded: Loaded | None = None,
) -> bool:
    """Likewise.

    Args:
        claims: by servers that host what they claim to leave.
        coverage: that of all others.
        servers: how many there are.
        others: need be named only if `me` knows its ways to them.
        loaded: by the mover, as it is given to :func:`wanted_over`.
    """
    before = [one for one in claims if one.peer_id != move.peer_id and goes_before(one, move)]
    if len(before) >= max(1, int(policy.at_once * servers)):
        return False
    meanwhile = coverage.copy()
    for claim in before:
        meanwhile.remove(claim.old, claim.steps_per_s)
    if not _is_harmless(move, whole(me, loaded), meanwhile):
        return False
    for claim in before:
        meanwhile.add(claim.new, claim.new_steps_per_s)
    gone_to = {claim.peer_id: claim.new for claim in before}
    arrived = [
        replace(one, start=gone_to[one.peer_id][0], end=gone_to[one.peer_id][1]) if one.peer_id in gone_to else one
        for one in others
    ]
    again = wanted_over(me, meanwhile, policy, arrived, loaded)
    return again is not None and again.new == move.new


def goes_before(one: Move, other: Move) -> bool:
    """Whether `one` comes first, of two moves that are claimed at the same time."""
    return _order(one) < _order(other)


def _is_harmless(move: Move, me: Hosting, coverage: Coverage) -> bool:
    """Whether no block loses its last server by `move`, nor its second without need; `coverage` is that of others."""
    if move.is_focus:
        return may_give_up(move.old, move.new, coverage, alone=move.urgency is Urgency.FIRST_SERVER)
    return bool(allowed_starts(me, coverage)[move.new[0]])


def _order(move: Move) -> tuple[float, float, bytes]:
    return -move.urgency, -move.gain, hashlib.sha256(move.peer_id.encode()).digest()
