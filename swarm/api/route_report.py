"""The route of an answer, for those who want to see it: which servers, and where the time of a token goes."""

from __future__ import annotations

import time
from typing import Any

from swarm.client import Token

_EVERY_S = 0.5


class RouteReport:
    """Goes along with an answer, at most twice a second."""

    def __init__(self) -> None:
        self._last = 0.0

    def extra(self, token: Token) -> dict[str, Any]:
        """The field ``swarm`` for a chunk, or nothing. Times in milliseconds."""
        now = time.monotonic()
        if now - self._last < _EVERY_S:
            return {}
        self._last = now
        hops = [
            {
                "peer_id": hop.peer_id,
                "start": hop.start,
                "end": hop.end,
                "total_ms": round(hop.total_s * 1000, 2),
                "queue_ms": round(hop.queue_s * 1000, 2),
                "compute_ms": round(hop.compute_s * 1000, 2),
                "network_ms": round(hop.network_s * 1000, 2),
            }
            for hop in token.timing.hops
        ]
        step_ms = round(token.timing.total_s * 1000, 2)
        return {"swarm": {"hops": hops, "step_ms": step_ms, "recoveries": token.recoveries}}
