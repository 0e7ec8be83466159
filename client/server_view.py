"""A client's picture of a model's servers: who there is, who failed lately, and which way to go."""

from __future__ import annotations

import time

from swarm.client.settings import ClientSettings
from swarm.dht import Announcement, Directory, State
from swarm.errors import RemoteError
from swarm.models import Checkpoint
from swarm.routing import HostedSpan, Leg, find_route, uncovered_blocks

_PENALTY_S = 15.0
"""A server that died is left alone for longer than its announcement can survive it."""
_REFUSAL_PENALTY_S = 5.0


class ServerView:
    """Servers of one model, as the directory and this client's own experience show them."""

    def __init__(self, directory: Directory, checkpoint: Checkpoint, dtype: str, settings: ClientSettings) -> None:
        self._directory, self._checkpoint, self._dtype, self._settings = directory, checkpoint, dtype, settings
        self._servers: dict[str, Announcement] = {}
        self._seen_at = float("-inf")
        self._penalties: dict[str, tuple[float, str]] = {}

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
        usable = [
            server for server in self._servers.values() if server.peer_id != without and not self._objection(server)
        ]
        return find_route([_hosted(server) for server in usable], start, end, salt=salt)

    def penalize(self, peer_id: str, error: Exception) -> None:
        """Leave a server alone for a while, because of `error`."""
        seconds = _REFUSAL_PENALTY_S if isinstance(error, RemoteError) else _PENALTY_S
        self._penalties[peer_id] = (time.monotonic() + seconds, str(error))

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

    def _objection(self, server: Announcement) -> str | None:
        """Why a server cannot be used now; None if it can."""
        allowed = self._settings.allowed_servers
        until, reason = self._penalties.get(server.peer_id, (0.0, ""))
        if server.state is State.JOINING:
            return "joining: it is loading its blocks"
        if server.state is not State.ONLINE:
            return f"{server.state.value}: it takes no new session"
        if (allowed is not None and server.peer_id not in allowed) or server.peer_id in self._settings.blocked_servers:
            return "excluded by this client's settings"
        if server.num_blocks != self._checkpoint.num_blocks:
            return f"announces {server.num_blocks} blocks instead of {self._checkpoint.num_blocks}"
        if server.dtype != self._dtype and not self._settings.any_precision:
            return f"computes in {server.dtype}, this client in {self._dtype} (any_precision=True allows it)"
        if time.monotonic() < until:
            return f"failed a moment ago: {reason}"
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
