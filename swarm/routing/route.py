"""Find the way through blocks ``[start, end)`` that takes a session the least time, over the spans servers host."""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swarm.routing.costs import ONE_STEP, LinkSeconds, Profile, Seconds, block_seconds, link_seconds
from swarm.routing.snapshot import ClientLinks, HostedSpan, Leg

_UNKNOWN_LINKS = ClientLinks()
_ROUNDING = 1e-12
_LOAD_TOLERANCE = 0.25
"""Loads that differ by no more are alike: they are some seconds old, and who takes the least would meet all others."""
_LEAST_CAPACITY, _MOST_CAPACITY = 1e-6, 1e15

Indices = NDArray[np.intp]


def find_route(
    spans: Sequence[HostedSpan],
    start: int,
    end: int,
    *,
    links: ClientLinks = _UNKNOWN_LINKS,
    profile: Profile = ONE_STEP,
    pinned: Collection[str] = (),
    tolerance: float = 0.0,
    salt: str = "",
) -> tuple[Leg, ...] | None:
    """The legs through ``[start, end)`` with the least expected time, or None if a block has no server.

    Exact: every pair of servers may have a cost of its own, and a server may be left before its span ends, and joined
    after its span begins. Dynamic programming from the last block to the first over (block, server).

    Args:
        links: the client's measurements.
        profile: what the session has to do; its time is what is minimized.
        pinned: peer ids; blocks that any of these hosts are given to nobody else.
        tolerance: how much dearer (0.05: by 5%) a route may be than the best to be taken as well as that. If it is more
            than 0, a route is also as good if measurements cannot tell it from the best.
        salt: chooses between routes that are as good, with chances in proportion to what their servers bear, so that
            different sessions choose differently.
    """
    ways = _Ways.through(spans, start, end, links, profile, pinned)
    return ways.walk(tolerance, salt) if ways is not None else None


def least_seconds(
    spans: Sequence[HostedSpan],
    start: int,
    end: int,
    *,
    links: ClientLinks = _UNKNOWN_LINKS,
    profile: Profile = ONE_STEP,
    pinned: Collection[str] = (),
) -> float:
    """What the best route is expected to take; infinite if there is none."""
    ways = _Ways.through(spans, start, end, links, profile, pinned)
    return ways.least_s if ways is not None else math.inf


def route_seconds(
    route: Sequence[Leg],
    spans: Sequence[HostedSpan],
    *,
    links: ClientLinks = _UNKNOWN_LINKS,
    profile: Profile = ONE_STEP,
) -> float:
    """What a route is expected to take; infinite if one of its servers is not among `spans`, or hosts other blocks."""
    by_peer = {span.peer_id: span for span in spans}
    hosts = [by_peer.get(leg.peer_id) for leg in route]
    used = [
        host
        for host, leg in zip(hosts, route, strict=True)
        if host is not None and host.start <= leg.start and leg.end <= host.end
    ]
    if len(used) < len(route) or not route:
        return math.inf
    unique = list({span.peer_id: span for span in used}.values())
    index = {span.peer_id: number for number, span in enumerate(unique)}
    cost, order = link_seconds(unique, links, profile), [index[span.peer_id] for span in used]
    seconds = cost.arriving[order[0]] + cost.leaving[order[-1]]
    seconds += sum(cost.between[one, two] for one, two in itertools.pairwise(order))
    return float(
        seconds
        + sum((leg.end - leg.start) * block_seconds(span, profile) for leg, span in zip(route, used, strict=True))
    )


def uncovered_blocks(spans: Sequence[HostedSpan], start: int, end: int) -> list[int]:
    """The blocks of ``[start, end)`` that no span hosts."""
    return [block for block in range(start, end) if not any(span.start <= block < span.end for span in spans)]


@dataclass(frozen=True)
class _Ways:
    """The time of the best way from every block on every server to the end."""

    start: int
    spans: Sequence[HostedSpan]
    cost: LinkSeconds
    block_s: Seconds
    hosts: Sequence[Indices]
    """Of each block."""
    onward: Sequence[Seconds]
    """For each block and each of its hosts: the least time from there, this block included."""

    @classmethod
    def through(
        cls,
        spans: Sequence[HostedSpan],
        start: int,
        end: int,
        links: ClientLinks,
        profile: Profile,
        pinned: Collection[str],
    ) -> _Ways | None:
        used = sorted((span for span in spans if span.start < end and start < span.end), key=lambda one: one.peer_id)
        starts, ends = np.array([span.start for span in used]), np.array([span.end for span in used])
        is_pinned = np.array([span.peer_id in pinned for span in used], dtype=bool)
        hosts: list[Indices] = []
        for block in range(start, end):
            hosting = (starts <= block) & (block < ends)
            preferred = hosting & is_pinned
            hosts.append(np.flatnonzero(preferred if preferred.any() else hosting))
            if not hosts[-1].size:
                return None
        cost = link_seconds(used, links, profile)
        block_s = np.array([block_seconds(span, profile) for span in used], dtype=np.float64)
        onward: list[Seconds] = [block_s[hosts[-1]] + cost.leaving[hosts[-1]]]
        arrival_s = _least_off_diagonal(cost.between)
        for here, there in zip(hosts[-2::-1], hosts[:0:-1], strict=True):
            onward.append(block_s[here] + _least(cost.between, arrival_s, here, there, onward[-1]))
        return cls(start, used, cost, block_s, hosts, onward[::-1])

    @property
    def least_s(self) -> float:
        return float((self.cost.arriving[self.hosts[0]] + self.onward[0]).min())

    def walk(self, tolerance: float, salt: str) -> tuple[Leg, ...]:
        """A way that takes at most so much longer than the best (or as measurements of both may be off); the choice
        between servers is the salt's.

        It changes servers where a best way does: what is within the tolerance is not spent on further changes.
        """
        limit = self.least_s * (1 + tolerance + _ROUNDING)
        servers, bounds = self._best(self.least_s * (1 + _ROUNDING), salt)
        spent, doubt = self._seconds(servers, bounds), self._doubt(servers)
        for leg in range(len(servers) if tolerance > 0 else 0):
            able = functools.reduce(np.intersect1d, self.hosts[bounds[leg] : bounds[leg + 1]])
            good = {servers[leg]: spent}
            for server in set(able.tolist()) - set(servers[max(0, leg - 1) : leg + 2]):
                other = [*servers[:leg], server, *servers[leg + 1 :]]
                seconds = self._seconds(other, bounds)
                if seconds <= limit + doubt + self._doubt(other):
                    good[server] = seconds
            servers[leg] = self._choose(list(good), salt)
            spent = good[servers[leg]]
        return tuple(
            Leg(self.spans[server].peer_id, self.start + begin, self.start + end)
            for server, begin, end in zip(servers, bounds, bounds[1:], strict=False)
        )

    def _best(self, limit: float, salt: str) -> tuple[list[int], list[int]]:
        """The servers of a best way, and the blocks (from 0) at which their legs begin, and the end."""
        servers, bounds, spent = list[int](), list[int](), 0.0
        for number, (there, onward) in enumerate(zip(self.hosts, self.onward, strict=True)):
            ways = (self.cost.between[servers[-1]] if servers else self.cost.arriving)[there]
            seconds = ways + onward
            staying = np.flatnonzero(there == servers[-1]) if servers else np.empty(0, dtype=np.intp)
            if not (staying.size and seconds[staying[0]] <= seconds.min()):
                good = np.flatnonzero((spent + seconds <= limit) | (seconds == seconds.min()))
                chosen = self._choose(there[good].tolist(), salt)
                spent += float(ways[there == chosen][0])
                if not servers or chosen != servers[-1]:
                    servers.append(chosen)
                    bounds.append(number)
            spent += float(self.block_s[servers[-1]])
        return servers, [*bounds, len(self.hosts)]

    def _seconds(self, servers: Sequence[int], bounds: Sequence[int]) -> float:
        links = self.cost.arriving[servers[0]] + self.cost.leaving[servers[-1]]
        links += sum(self.cost.between[one, two] for one, two in itertools.pairwise(servers))
        blocks = (end - begin for begin, end in itertools.pairwise(bounds))
        return float(links + sum(self.block_s[server] * length for server, length in zip(servers, blocks, strict=True)))

    def _doubt(self, servers: Sequence[int]) -> float:
        """By how many seconds what the client's links take on a way may be off."""
        return float(self.cost.doubts[servers[0]] + self.cost.doubts[servers[-1]])

    def _choose(self, servers: Sequence[int], salt: str) -> int:
        """One of servers that are as good: of those that bear least for what they can, any in proportion to that."""
        bears = [min(max(self.spans[one].capacity, _LEAST_CAPACITY), _MOST_CAPACITY) for one in servers]
        loads = [self.spans[one].sessions / most for one, most in zip(servers, bears, strict=True)]
        limit = min(loads) * (1 + _LOAD_TOLERANCE)
        tickets = [
            (self._draw(one, salt) / most, self.spans[one].peer_id, one)
            for one, most, load in zip(servers, bears, loads, strict=True)
            if load <= limit
        ]
        return min(tickets)[-1]

    def _draw(self, server: int, salt: str) -> float:
        """An exponential variate: the first of some such arrivals is each with a chance in proportion to its rate."""
        digest = hashlib.sha256(f"{salt} {self.spans[server].peer_id}".encode()).digest()
        return -math.log((int.from_bytes(digest[:7]) + 0.5) / 2**56)


def _least(between: Seconds, arrival_s: Seconds, here: Indices, there: Indices, onward: Seconds) -> Seconds:
    """For each server of `here` the least of what the ways over each of `there` take, ``[len(here)]``.

    Each can stay, if it is there, or go to the best. Only those of `there` are looked at in pairs that could be better
    than that for anyone: few, unless links differ more than servers.
    """
    staying = np.full(len(between), np.inf)
    staying[there] = onward
    best = int(onward.argmin())
    at_most: Seconds = np.minimum(staying[here], between[here, there[best]] + onward[best])
    good = arrival_s[there] + onward < at_most.max()
    if not good.any():
        return at_most
    seconds: Seconds = (between[here[:, None], there[good][None, :]] + onward[good][None, :]).min(axis=1)
    least: Seconds = np.minimum(at_most, seconds)
    return least


def _least_off_diagonal(between: Seconds) -> Seconds:
    """The least that going to each server takes, from any other, ``[n]``."""
    others = between.copy()
    np.fill_diagonal(others, np.inf)
    least: Seconds = others.min(axis=0)
    return least
