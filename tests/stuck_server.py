"""``swarm-server`` that accepts sessions and answers pings, and computes nothing: its device has hung, say."""

from __future__ import annotations

import sys

from swarm.commands.server import main
from swarm.protocol.served_actions import Work
from swarm.server.session_stream import SessionStream


class _Stuck(SessionStream):
    def _compute(self, work: Work) -> None:
        """Nothing ever comes of it."""


if __name__ == "__main__":
    import swarm.server.streams

    swarm.server.streams.SessionStream = _Stuck  # type: ignore[misc]
    sys.exit(main())
