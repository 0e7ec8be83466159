"""``swarm-server`` that loses a session now and then, for benchmarks.failures.

The environment variable SWARM_FAILURES names a file with a probability: with it, in every step, the stream of the
session breaks and its cache is gone, as if the server had died and come back.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

from swarm.commands.server import main
from swarm.protocol.served_actions import Work
from swarm.server.session_stream import SessionStream

_PROBABILITY = Path(os.environ["SWARM_FAILURES"])


class _Unreliable(SessionStream):
    def _compute(self, work: Work) -> None:
        if random.random() < float(_PROBABILITY.read_text()):
            self.end()
        else:
            super()._compute(work)


if __name__ == "__main__":
    import swarm.server.streams

    swarm.server.streams.SessionStream = _Unreliable  # type: ignore[misc]
    sys.exit(main())
