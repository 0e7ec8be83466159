"""Run the whole suite in lanes, side by side: ``python -m tests.in_lanes [pytest's arguments]``.

Tests of real processes and sockets wait a good deal, for others' sakes. So those of which something is timed closely
(``live``) run beside those of which nothing is (``patient``), and all that start no processes (``others``) take what is
left, with the lowest priority. While a test that is marked ``quiet`` runs, the other lanes rest.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

SHARED_HOME = "SWARM_TESTS_HOME"
"""The environment variable that names the directory where all keep what is computed once."""
_BESIDE = {"patient": 0, "others": 9}
"""Parts that run beside ``live``, and how nice each is to be."""
PARTS = ("live", *_BESIDE)
_TELL_EVERY_S = 30.0


@contextlib.contextmanager
def taking_turns(home: Path, alone: bool) -> Iterator[None]:
    """While a test runs; `alone`: and none in other lanes, which wait between two tests."""
    with (home / "door.lock").open("w") as door, (home / "room.lock").open("w") as room:
        fcntl.flock(door, fcntl.LOCK_EX)  # who waits for an empty room lets nobody else in
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        yield


class _Lane:
    """One pytest, which runs one part; what it says is kept until it has ended."""

    def __init__(self, command: list[str], niceness: int, environment: dict[str, str]) -> None:
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the lane
        self._running = subprocess.Popen(
            ["nice", "-n", str(niceness), *command], stdout=self._said, stderr=subprocess.STDOUT, env=environment
        )

    @property
    def is_alive(self) -> bool:
        return self._running.poll() is None

    def end(self) -> int:
        """Break off, unless it has ended; its code: not 0 if some test failed."""
        self._running.terminate()
        return self._running.wait()

    def show(self) -> None:
        """Print what it said."""
        self._said.seek(0)
        print(self._said.read(), flush=True)


def main(arguments: list[str]) -> int:
    """Returns 0 if all tests of all parts passed."""
    pytest = [sys.executable, "-m", "pytest", *arguments, "--part"]
    with tempfile.TemporaryDirectory(prefix="swarm-tests-") as home:
        environment = {**os.environ, SHARED_HOME: home}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # every process would compile Swarm anew, for 0.8 s
        lanes = [_Lane([*pytest, part], niceness, environment) for part, niceness in _BESIDE.items()]
        try:
            codes = [subprocess.call([*pytest, "live"], env=environment)]
            _wait(lanes)
        finally:
            codes_beside = [lane.end() for lane in lanes]
        for lane in lanes:
            lane.show()
    return max(map(abs, [*codes, *codes_beside]))


def _wait(lanes: list[_Lane]) -> None:
    told_at = 0.0
    while any(lane.is_alive for lane in lanes):
        if time.monotonic() - told_at > _TELL_EVERY_S:
            print("waiting for the other lanes", file=sys.stderr, flush=True)
            told_at = time.monotonic()
        time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
