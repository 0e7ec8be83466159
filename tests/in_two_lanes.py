"""Run the whole suite in two lanes, side by side: ``python -m tests.in_two_lanes [pytest's arguments]``.

Tests of real processes and sockets wait a good deal, for others' sakes. Meanwhile all other tests run in the second
lane, with the lowest priority, lest they disturb what is timed; after them, there, those of real processes of which
nothing is timed to a fraction of a second. While a test that is marked ``quiet`` runs, the other lane rests.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

SHARED_HOME = "SWARM_TESTS_HOME"
"""The environment variable that names the directory where all keep what is computed once."""
PARTS = ("live", "others", "patient")
_TELL_EVERY_S = 30.0


@contextlib.contextmanager
def taking_turns(home: Path, alone: bool) -> Iterator[None]:
    """While a test runs; `alone`: and none in the other lane, which waits between two tests."""
    with (home / "door.lock").open("w") as door, (home / "room.lock").open("w") as room:
        fcntl.flock(door, fcntl.LOCK_EX)  # who waits for an empty room lets nobody else in
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        yield


class _Lane(threading.Thread):
    """Runs pytest once for each part, one after the other."""

    def __init__(self, pytest: list[str], parts: dict[str, int], said: IO[str], environment: dict[str, str]) -> None:
        """
        Args:
            parts: how nice each is to be.
            said: takes what they say.
        """
        super().__init__(daemon=True)
        self._pytest, self._parts, self._said, self._environment = pytest, parts, said, environment
        self._running: subprocess.Popen[bytes] | None = None
        self._ended = False
        self.code = 0
        """Not 0: some test failed."""

    def run(self) -> None:
        for part, niceness in self._parts.items():
            if self._ended:
                return
            self._running = subprocess.Popen(
                ["nice", "-n", str(niceness), *self._pytest, "--part", part],
                stdout=self._said,
                stderr=subprocess.STDOUT,
                env=self._environment,
            )
            self.code = self._running.wait() or self.code

    def end(self) -> None:
        """Break off."""
        self._ended = True
        if self._running is not None:
            self._running.terminate()
        self.join()


def main(arguments: list[str]) -> int:
    """Returns 0 if all tests of all parts passed."""
    pytest = [sys.executable, "-m", "pytest", *arguments]
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryDirectory(prefix="swarm-tests-") as home:
        environment = {**os.environ, SHARED_HOME: home}
        second = _Lane(pytest, {"others": 19, "patient": 0}, said, environment)
        second.start()
        try:
            live = subprocess.call([*pytest, "--part", "live"], env=environment)
            _wait(second)
        finally:
            second.end()
        said.seek(0)
        print(said.read(), flush=True)
    return live or second.code


def _wait(lane: _Lane) -> None:
    told_at = 0.0
    while lane.is_alive():
        if time.monotonic() - told_at > _TELL_EVERY_S:
            print("waiting for the other lane", file=sys.stderr, flush=True)
            told_at = time.monotonic()
        lane.join(0.2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
