"""A client's picture of a model's servers: who there is, who failed lately, and which way to go."""

from __future__ import annotations

import random
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto

from swarm.client.link_times import LEAST_RTT_S, LinkTimes
from swarm.client.own_sessions import OwnSessions
from swarm.client.settings import ClientSettings
from swarm.client.waiting_line import WaitingLine
from swarm.dht import Announcement, Directory, State, precision_name
from swarm.errors import RemoteError
from swarm.models import Checkpoint
from swarm.number_runs import runs, runs_text
from swarm.routing import (
    INTERACTIVE,
    ClientLinks,
    FailureMemory,
    HostedSpan,
    Leg,
    Profile,
    Standing,
    find_route,
    least_seconds,
    route_seconds,
    uncovered_blocks,
    with_estimates,
    worth_rerouting,
)
from swarm.transport.node import Node

_PENALTY_S = 15.0
"""A server that died is left alone for longer than its announcement can survive it."""
_REFUSAL_PENALTY_S = 5.0
_AS_GOOD = 0.05
"""Routes that are expected to take so little longer than the best are as good: estimates are not better than that, and
clients that all took the best would meet there."""
_SCARCE_ROOM_S = 1.0
"""What taking all the room that a server has is reckoned to cost; nothing for half of it."""
_RETRY_ROOM_S, _LONGEST_RETRY_S = 1.0, 30.0
"""A server that is full, and does not say when to ask again, is asked after this long."""
_JITTER = 0.5
"""Clients ask up to this share later than they were told to, so that they do not come all at once."""
_FREED_S = 0.05
"""A session that was closed here has ended on its server after this long."""


@dataclass(frozen=True)
class Wish:
    """What a session wants of every server on its route."""

    positions: int = 0
    """Of KV cache, over all sequences."""
    waits_for_others: bool = False
    """Sessions of this client have waited for room for longer: do not try those servers before them."""
    too_small: Mapping[str, str] = field(default_factory=dict)
    """Servers whose whole cache is smaller than that, and what they said."""
    session: str = ""
    """Who wishes: a name among this client's sessions."""
    profile: Profile = INTERACTIVE
    """What it has to do."""


_NOTHING = Wish()


class Hurdle(Enum):
    """Why a server cannot be used, as far as what to do follows from it."""

    UNFIT = auto()
    FAILED_NOW = auto()
    FAILED_LATELY = auto()
    """It may be tried if there is no other way."""
    FULL = auto()
    TOO_SMALL = auto()


_FOR_NOW = frozenset({Hurdle.FAILED_NOW, Hurdle.FAILED_LATELY, Hurdle.FULL})


@dataclass(frozen=True)
class _Full:
    until: float
    positions: int
    """It had no room for as many as these."""
    reason: str


class ServerView:
    """Servers of one model, as the directory and this client's own experience show them."""

    def __init__(
        self, node: Node, directory: Directory, checkpoint: Checkpoint, dtype: str, settings: ClientSettings
    ) -> None:
        self._directory, self._checkpoint, self._settings = directory, checkpoint, settings
        self._precision = precision_name(dtype, settings.quantization or "")
        self._servers: dict[str, Announcement] = {}
        self._seen_at = float("-inf")
        self._failures = FailureMemory()
        self._links = LinkTimes(node)
        self._own = OwnSessions()
        self._full: dict[str, _Full] = {}
        self.line = WaitingLine()

    async def refresh(self, *, max_age_s: float) -> None:
        """Look the servers up again, unless that was done less than `max_age_s` ago.

        A look-up may wait for a node of the directory that has just died, so recovery tries what is known first.
        """
        if time.monotonic() - self._seen_at >= max_age_s:
            found = await self._directory.servers(self._checkpoint.model_digest)
            self._servers = {server.peer_id: server for server in found}
            self._seen_at = time.monotonic()

    async def measure_links(self) -> None:
        """Find out how far servers are to which no session has led yet. Takes a second at most, and only once for each
        server."""
        servers = [one for one in self._servers.values() if self._objection(one, _NOTHING) is None]
        random.shuffle(servers)  # where there are many, every client asks others
        if len(servers) > 1:
            await self._links.ask(servers)

    def server(self, peer_id: str) -> Announcement:
        """The announcement of a server on a route that :meth:`route` returned."""
        return self._servers[peer_id]

    def route(
        self, start: int, end: int, *, salt: str, wish: Wish = _NOTHING, without: str | None = None
    ) -> tuple[Leg, ...] | None:
        """The best way through ``[start, end)`` over servers in good standing; None if there is none.

        Those that announce room for `wish` come first; what they announce is some seconds old, so others are not left
        out. Those that said they had none are, until it is time to ask again. Routes that are as good are chosen by
        `salt`, with chances in proportion to what their servers bear.
        """
        servers = [server for server in self._servers.values() if server.peer_id != without]
        roomy = [server for server in servers if server.free_kv_tokens >= wish.positions]
        for some, overlook in [(roomy, set()), (servers, set()), (servers, {Hurdle.FAILED_LATELY})]:
            if (route := self._route(some, start, end, wish, overlook, salt)) is not None:
                return route
        return None

    def is_merely_full(self, start: int, end: int, wish: Wish) -> bool:
        """Whether there would be a way if servers that are full now had room."""
        return self._route(self._servers.values(), start, end, wish, {Hurdle.FULL}) is not None

    def is_too_small(self, start: int, end: int, wish: Wish) -> bool:
        """Whether there never is a way, only because servers are too small for `wish`."""
        ways = [
            self._route(self._servers.values(), start, end, wish, overlook) is not None
            for overlook in (_FOR_NOW, _FOR_NOW | {Hurdle.TOO_SMALL})
        ]
        return ways == [False, True]

    def standby(self, start: int, end: int, *, without: frozenset[str], salt: str, wish: Wish = _NOTHING) -> Leg | None:
        """One server, none of `without`, that could take over all of ``[start, end)``; None if there is none."""
        hosts = [
            self._hosted(server, wish)
            for server in self._servers.values()
            if server.start <= start and end <= server.end
            if server.peer_id not in without and self._objection(server, wish) is None
        ]
        if pinned := self._pinned_in(start, end):
            hosts = [host for host in hosts if host.peer_id in pinned]
        route = self._find(hosts, start, end, wish, salt)
        return route[0] if route is not None and len(route) == 1 else None

    def has_better_way(self, route: Sequence[Leg], wish: Wish, replayed: int) -> bool:
        """Whether a session should leave a route that works, to tell other servers its `replayed` positions.

        Args:
            wish: with what remains to be done as its profile.
        """
        start, end = route[0].start, route[-1].end
        hosts = self._usable(self._servers.values(), wish, ())
        links = self._client_links(hosts)
        pinned = self._settings.pinned_servers
        now_used = {leg.peer_id for leg in route}
        present = [self._hosted(one, wish) for one in self._servers.values() if one.peer_id in now_used]
        if {one.peer_id for one in present} != now_used:
            return False  # it is leaving, or was not found just now: others see to that
        hosted = {one.peer_id: range(one.start, one.end + 1) for one in present}
        if any(leg.start not in hosted[leg.peer_id] or leg.end not in hosted[leg.peer_id] for leg in route):
            return False  # it has changed its focus: it goes on with this session, and that is all that it says now
        replay = replace(wish.profile, steps=0.0, prompt_positions=float(replayed))
        return worth_rerouting(
            route_seconds(route, present, links=links, profile=wish.profile),
            least_seconds(hosts, start, end, links=links, profile=wish.profile, pinned=pinned),
            least_seconds(hosts, start, end, links=links, profile=replay, pinned=pinned),
        )

    def session_opened(self, peer_id: str, session: str) -> None:
        """A session of this client goes to a server."""
        now = time.monotonic()
        self._own.opened(peer_id, session, time.time(), now)
        self._failures.chosen(peer_id, now, session)

    def session_closed(self, peer_id: str, session: str) -> None:
        """It has left it, or lost it."""
        self._own.closed(peer_id, session, time.time())

    def worked(self, peer_id: str, session: str, one_way_s: float | None) -> None:
        """A step of `session` has passed a server, to which the way takes so long."""
        if one_way_s is not None:
            self._links.heard(peer_id, 2 * one_way_s)
        if (since := self._own.since(peer_id, session)) is not None:
            self._failures.succeeded(peer_id, since)

    def penalize(self, peer_id: str, error: Exception) -> None:
        """Leave a server alone for a while, because of `error`; for longer if it failed when it was tried again."""
        seconds = _REFUSAL_PENALTY_S if isinstance(error, RemoteError) else _PENALTY_S
        self._failures.failed(peer_id, time.monotonic(), seconds, str(error))

    def found_full(self, peer_id: str, wish: Wish, reason: str, retry_after_s: float | None) -> None:
        """A server has no room for `wish`. It is in good standing: those who want less, or later, may ask."""
        now, before = time.monotonic(), self._full.get(peer_id)
        asked_s = min(retry_after_s, _LONGEST_RETRY_S) if retry_after_s is not None else _RETRY_ROOM_S
        until = now + asked_s * random.uniform(1, 1 + _JITTER)
        positions = wish.positions if before is None or before.until <= now else min(wish.positions, before.positions)
        self._full[peer_id] = _Full(until, positions, reason)

    def room_freed(self, peer_id: str) -> None:
        """A session of this client has left a server: who waits for room there need not wait any longer."""
        if (full := self._full.get(peer_id)) is not None:
            self._full[peer_id] = replace(full, until=min(full.until, time.monotonic() + _FREED_S))
            self.line.news()

    def ask_again_in_s(self) -> float:
        """When the next of the servers that were full may be asked again."""
        now = time.monotonic()
        return min((full.until - now for full in self._full.values() if full.until > now), default=_RETRY_ROOM_S)

    def explain_room(self, start: int, end: int, wish: Wish) -> str:
        """Which servers of ``[start, end)`` have no room, and how much they have, for an error message."""
        objections = [(server, self._objection(server, wish)) for server in self._servers.values()]
        return "\n".join(
            f"  {server.peer_id} ({_ranges(range(server.start, server.end))}): {objection[1]}"
            for server, objection in objections
            if objection is not None and objection[0] in (Hurdle.FULL, Hurdle.TOO_SMALL)
            if server.start < end and start < server.end
        )

    def explain(self, start: int, end: int) -> str:
        """Which of the blocks ``[start, end)`` cannot be served, and why, for an error message."""
        usable = self._usable(self._servers.values(), _NOTHING, ())
        missing = uncovered_blocks(usable, start, end)
        lines = [f"No server is available for {_ranges(missing)} of {self._checkpoint.name}."] if missing else []
        for peer_id in self._settings.pinned_servers:
            if peer_id not in self._servers:
                lines.append(f"The pinned server {peer_id} does not announce this model.")
            elif (objection := self._objection(self._servers[peer_id], _NOTHING)) is not None:
                lines.append(f"The pinned server {peer_id} cannot be used: {objection[1]}.")
        if not self._servers:
            lines.append(f"Nobody announces this model (digest {self._checkpoint.model_digest[:16]}…).")
        for server in self._servers.values():
            objection = self._objection(server, _NOTHING)
            if objection is not None and any(server.hosts(block) for block in missing):
                lines.append(f"  {server.peer_id} ({_ranges(range(server.start, server.end))}): {objection[1]}")
        return "\n".join(lines)

    def _route(
        self,
        servers: Iterable[Announcement],
        start: int,
        end: int,
        wish: Wish,
        overlook: Collection[Hurdle],
        salt: str = "",
    ) -> tuple[Leg, ...] | None:
        usable = self._usable(servers, wish, overlook)
        if not {span.peer_id for span in usable}.issuperset(self._settings.pinned_servers):
            return None
        return self._find(usable, start, end, wish, salt)

    def _find(self, hosts: Sequence[HostedSpan], start: int, end: int, wish: Wish, salt: str) -> tuple[Leg, ...] | None:
        return find_route(
            hosts,
            start,
            end,
            links=self._client_links(hosts),
            profile=wish.profile,
            pinned=self._settings.pinned_servers,
            tolerance=_AS_GOOD,
            salt=salt,
        )

    def _usable(self, servers: Iterable[Announcement], wish: Wish, overlook: Collection[Hurdle]) -> list[HostedSpan]:
        objections = ((server, self._objection(server, wish)) for server in servers)
        return [self._hosted(server, wish) for server, why in objections if why is None or why[0] in overlook]

    def _hosted(self, server: Announcement, wish: Wish) -> HostedSpan:
        share = min(wish.positions / server.free_kv_tokens, 1.0) if server.free_kv_tokens else float(wish.positions > 0)
        return HostedSpan(
            server.peer_id,
            server.start,
            server.end,
            server.throughput,
            server.decode_steps_per_s,
            server.prefill_tokens_per_s,
            self._own.load(server.peer_id, server.sessions, server.issued_at, wish.session),
            {peer_id: max(rtt_s, LEAST_RTT_S) for peer_id, rtt_s in server.rtts_s.items()},
            server.upload_bytes_per_s,
            server.download_bytes_per_s,
            self._failures.expected_loss_s(server.peer_id, time.monotonic()) + _SCARCE_ROOM_S * max(0.0, 2 * share - 1),
        )

    def _client_links(self, hosts: Sequence[HostedSpan]) -> ClientLinks:
        return with_estimates(ClientLinks(self._links.rtts_s, doubts_s=self._links.doubts_s), hosts)

    def _pinned_in(self, start: int, end: int) -> set[str]:
        """Those of the pinned servers that host any of these blocks."""
        servers = [self._servers[one] for one in self._settings.pinned_servers if one in self._servers]
        return {server.peer_id for server in servers if server.start < end and start < server.end}

    def _objection(self, server: Announcement, wish: Wish) -> tuple[Hurdle, str] | None:
        """Why a server cannot be used for `wish` now; None if it can."""
        if (unfit := self._unfit(server)) is not None:
            return Hurdle.UNFIT, unfit
        now, full = time.monotonic(), self._full.get(server.peer_id)
        if server.peer_id in wish.too_small:
            return Hurdle.TOO_SMALL, wish.too_small[server.peer_id]
        standing = self._failures.standing(server.peer_id, now, wish.session)
        if standing not in (Standing.GOOD, Standing.MAY_BE_TRIED):
            hurdle = Hurdle.FAILED_NOW if standing is Standing.FAILED_NOW else Hurdle.FAILED_LATELY
            return hurdle, f"failed a moment ago: {self._failures.reason(server.peer_id)}"
        if full is not None and (wish.waits_for_others or (now < full.until and wish.positions >= full.positions)):
            return Hurdle.FULL, f"full: {full.reason}"
        return None

    def _unfit(self, server: Announcement) -> str | None:
        allowed = self._settings.allowed_servers
        if server.state is State.JOINING:
            return "joining: it is loading its blocks"
        if server.state is not State.ONLINE:
            return f"{server.state.value}: it takes no new session"
        if (allowed is not None and server.peer_id not in allowed) or server.peer_id in self._settings.blocked_servers:
            return "excluded by this client's settings"
        if server.num_blocks != self._checkpoint.num_blocks:
            return f"announces {server.num_blocks} blocks instead of {self._checkpoint.num_blocks}"
        if server.precision != self._precision and not self._settings.any_precision:
            return f"computes in {server.precision}, this client wants {self._precision} (any_precision=True allows it)"
        if self._hosts_other_weights(server):
            return "hosts weights that differ from this client's own copy"
        return None

    def _hosts_other_weights(self, server: Announcement) -> bool:
        if not server.block_digests or not self._checkpoint.files.paths:
            return False
        own = self._checkpoint.digests.blocks[server.start : server.end]
        return any(
            len(theirs) < 16 or not mine.startswith(theirs)
            for mine, theirs in zip(own, server.block_digests, strict=True)
        )


def _ranges(blocks: list[int] | range) -> str:
    """``[0, 1, 2, 7]`` → ``"blocks 0–2, 7"``."""
    return f"block{'s' if len(blocks) != 1 else ''} {runs_text(runs(blocks))}"
