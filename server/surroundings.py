"""What placement is to know of the other servers, from what they announce. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import mean

from swarm.dht import Announcement, State
from swarm.placement import Hosting, Move


def comparable(announcements: Iterable[Announcement], num_blocks: int, precision: str) -> list[Announcement]:
    """Those of servers that can stand in for one of this precision: results of others differ, clients use one kind."""
    return [one for one in announcements if (one.num_blocks, one.precision) == (num_blocks, precision)]


def hostings(announcements: Iterable[Announcement]) -> list[Hosting]:
    """Who is there, joins or drains.

    Who has not measured its speed yet is taken to be as fast as the others are: as nothing, it would draw everybody to
    the blocks that it is loading.
    """
    found = [
        Hosting(
            peer_id=one.peer_id,
            start=one.start,
            end=one.end,
            steps_per_s=one.throughput,
            is_draining=one.state is State.DRAINING,
            rtts_s=one.rtts_s,
        )
        for one in announcements
        if one.state is not State.OFFLINE
    ]
    known = [one.steps_per_s * one.length for one in found if one.steps_per_s > 0]
    usual = mean(known) if known else 0.0
    return [one if one.steps_per_s > 0 else replace(one, steps_per_s=usual / one.length) for one in found]


def under_way(claims: Iterable[Move], announcements: Sequence[Announcement]) -> list[Move]:
    """The claims of moves that are not over: their owners are there, and do not serve at the new place yet."""
    there = {one.peer_id: one for one in announcements}
    return [
        claim
        for claim in claims
        if (owner := there.get(claim.peer_id)) is not None
        and (owner.state is not State.ONLINE or (owner.start, owner.end) == claim.old)
    ]


def leaves_enough(move: Move, others: Iterable[Announcement], num_blocks: int) -> bool:
    """Whether `move` takes no block from clients, judged by those who serve now: who is loading may yet fail.

    While it loads, the mover serves nothing, also not what it hosts before and after. That is allowed only for blocks
    that are of no use to anybody, because some other block has no server at all.
    """
    serving = [one for one in others if one.state is State.ONLINE and one.peer_id != move.peer_id]

    def alone(blocks: Iterable[int]) -> list[int]:
        return [block for block in blocks if not any(one.hosts(block) for one in serving)]

    only_mine = alone(range(*move.old))
    if move.is_focus:
        return all(move.new[0] <= block < move.new[1] for block in only_mine)
    missing = [block for block in alone(range(num_blocks)) if block not in only_mine]
    stays = all(move.new[0] <= block < move.new[1] for block in only_mine)
    return not only_mine or (bool(missing) and stays)
