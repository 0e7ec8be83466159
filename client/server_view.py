"""A client's picture of a model's servers: who there is, who failed lately, and which way to go."""

from __future__ import annotations

import random
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, auto

from swarm.client.settings import ClientSettings
from swarm.client.waiting_line import WaitingLine
from swarm.dht import Announcement, Directory, State, precision_name
from swarm.errors import RemoteError
from swarm.models import Checkpoint
from swarm.routing import HostedSpan, Leg, find_route, uncovered_blocks

_PENALTY_S = 15.0
"""A server that died is left alone for longer than its announcement can survive it."""
_REFUSAL_PENALTY_S = 5.0
_SECOND_CHANCE_S = 1.0
"""When there is no other way, a server that failed is tried again after this long."""
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
class _Penalty:
    at_least_until: float
    until: float
    reason: str


@dataclass(frozen=True)
class _Full:
    until: float
    positions: int
    """It had no room for as many as these."""
    reason: str


class ServerView:
    """Servers of one model, as the directory and this client's own experience show them."""

    def __init__(self, directory: Directory, checkpoint: Checkpoint, dtype: str, settings: ClientSettings) -> None:
        self._directory, self._checkpoint, self._settings = directory, checkpoint, settings
        self._precision = precision_name(dtype, settings.quantization or "")
        self._servers: dict[str, Announcement] = {}
        self._seen_at = float("-inf")
        self._penalties: dict[str, _Penalty] = {}
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

    def server(self, peer_id: str) -> Announcement:
        """The announcement of a server on a route that :meth:`route` returned."""
        return self._servers[peer_id]

    def route(
        self, start: int, end: int, *, salt: str, wish: Wish = _NOTHING, without: str | None = None
    ) -> tuple[Leg, ...] | None:
        """The best way through ``[start, end)`` over servers in good standing; None if there is none.

        Those that announce room for `wish` come first; what they announce is some seconds old, so others are not left
        out. Those that said they had none are, until it is time to ask again.
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
            _hosted(server)
            for server in self._servers.values()
            if server.start <= start and end <= server.end
            if server.peer_id not in without and self._objection(server, wish) is None
        ]
        route = find_route(hosts, start, end, salt=salt)
        return route[0] if route is not None and len(route) == 1 else None

    def penalize(self, peer_id: str, error: Exception) -> None:
        """Leave a server alone for a while, because of `error`."""
        seconds = _REFUSAL_PENALTY_S if isinstance(error, RemoteError) else _PENALTY_S
        now = time.monotonic()
        self._penalties[peer_id] = _Penalty(now + _SECOND_CHANCE_S, now + seconds, str(error))

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
        usable = [_hosted(server) for server in self._servers.values() if self._objection(server, _NOTHING) is None]
        missing = uncovered_blocks(usable, start, end)
        lines = [f"No server is available for {_ranges(missing)} of {self._checkpoint.name}."]
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
        objections = ((server, self._objection(server, wish)) for server in servers)
        usable = [_hosted(server) for server, why in objections if why is None or why[0] in overlook]
        return find_route(usable, start, end, salt=salt)

    def _objection(self, server: Announcement, wish: Wish) -> tuple[Hurdle, str] | None:
        """Why a server cannot be used for `wish` now; None if it can."""
        if (unfit := self._unfit(server)) is not None:
            return Hurdle.UNFIT, unfit
        now, penalty, full = time.monotonic(), self._penalties.get(server.peer_id), self._full.get(server.peer_id)
        if server.peer_id in wish.too_small:
            return Hurdle.TOO_SMALL, wish.too_small[server.peer_id]
        if penalty is not None and now < penalty.until:
            lately = now >= penalty.at_least_until
            return Hurdle.FAILED_LATELY if lately else Hurdle.FAILED_NOW, f"failed a moment ago: {penalty.reason}"
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


def _hosted(server: Announcement) -> HostedSpan:
    return HostedSpan(server.peer_id, server.start, server.end, server.throughput)


def _ranges(blocks: list[int] | range) -> str:
    """``[0, 1, 2, 7]`` → ``"blocks 0–2, 7"``."""
    parts: list[list[int]] = []
    for block in blocks:
        if parts and parts[-1][-1] == block - 1:
            parts[-1].append(block)
        else:
            parts.append([block])
    texts = [str(part[0]) if len(part) == 1 else f"{part[0]}–{part[-1]}" for part in parts]
    return f"block{'s' if len(blocks) != 1 else ''} {', '.join(texts)}"
