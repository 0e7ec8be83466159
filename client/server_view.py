"""A client's picture of a model's servers: who there is, who failed lately, and which way to go."""

from __future__ import annotations

import time
from dataclasses import dataclass

from swarm.client.settings import ClientSettings
from swarm.dht import Announcement, Directory, State, precision_name
from swarm.errors import RemoteError
from swarm.models import Checkpoint
from swarm.routing import HostedSpan, Leg, find_route, uncovered_blocks

_PENALTY_S = 15.0
"""A server that died is left alone for longer than its announcement can survive it."""
_REFUSAL_PENALTY_S = 5.0
_SECOND_CHANCE_S = 1.0
"""When there is no other way, a server that failed is tried again after this long."""


@dataclass(frozen=True)
class _Penalty:
    at_least_until: float
    until: float
    reason: str


class ServerView:
    """Servers of one model, as the directory and this client's own experience show them."""

    def __init__(self, directory: Directory, checkpoint: Checkpoint, dtype: str, settings: ClientSettings) -> None:
        self._directory, self._checkpoint, self._settings = directory, checkpoint, settings
        self._precision = precision_name(dtype, settings.quantization or "")
        self._servers: dict[str, Announcement] = {}
        self._seen_at = float("-inf")
        self._penalties: dict[str, _Penalty] = {}

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

    def route(self, start: int, end: int, *, salt: str, without: str | None = None) -> tuple[Leg, ...] | None:
        """The best way through ``[start, end)`` over servers in good standing; None if there is none."""
        servers = [server for server in self._servers.values() if server.peer_id != without]
        for forgiving in (False, True):
            usable = [_hosted(server) for server in servers if not self._objection(server, forgiving=forgiving)]
            if (route := find_route(usable, start, end, salt=salt)) is not None:
                return route
        return None

    def standby(self, start: int, end: int, *, without: frozenset[str], salt: str) -> Leg | None:
        """One server, none of `without`, that could take over all of ``[start, end)``; None if there is none."""
        hosts = [
            _hosted(server)
            for server in self._servers.values()
            if server.start <= start and end <= server.end
            if server.peer_id not in without and not self._objection(server)
        ]
        route = find_route(hosts, start, end, salt=salt)
        return route[0] if route is not None and len(route) == 1 else None

    def penalize(self, peer_id: str, error: Exception) -> None:
        """Leave a server alone for a while, because of `error`."""
        seconds = _REFUSAL_PENALTY_S if isinstance(error, RemoteError) else _PENALTY_S
        now = time.monotonic()
        self._penalties[peer_id] = _Penalty(now + _SECOND_CHANCE_S, now + seconds, str(error))

    def explain(self, start: int, end: int) -> str:
        """Which of the blocks ``[start, end)`` cannot be served, and why, for an error message."""
        usable = [_hosted(server) for server in self._servers.values() if not self._objection(server)]
        missing = uncovered_blocks(usable, start, end)
        lines = [f"No server is available for {_ranges(missing)} of {self._checkpoint.name}."]
        if not self._servers:
            lines.append(f"Nobody announces this model (digest {self._checkpoint.model_digest[:16]}…).")
        for server in self._servers.values():
            objection = self._objection(server)
            if objection and any(server.hosts(block) for block in missing):
                lines.append(f"  {server.peer_id} ({_ranges(range(server.start, server.end))}): {objection}")
        return "\n".join(lines)

    def _objection(self, server: Announcement, *, forgiving: bool = False) -> str | None:
        """Why a server cannot be used now; None if it can. `forgiving`: try again those who failed a while ago."""
        allowed = self._settings.allowed_servers
        penalty = self._penalties.get(server.peer_id)
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
        if penalty is not None and time.monotonic() < (penalty.at_least_until if forgiving else penalty.until):
            return f"failed a moment ago: {penalty.reason}"
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
