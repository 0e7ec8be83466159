"""Run the whole suite as two processes side by side: ``python -m tests.in_two_parts [pytest's arguments]``.

Tests of real processes and sockets wait a good deal, for others' sakes. Meanwhile all other tests run, with the lowest
priority, lest they disturb what is timed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time

SHARED_HOME = "SWARM_TESTS_HOME"
"""The environment variable that names the directory where both keep what is computed once."""
_TELL_EVERY_S = 30.0


def main(arguments: list[str]) -> int:
    """Returns 0 if all tests of both parts passed."""
    pytest = [sys.executable, "-m", "pytest", *arguments]
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryDirectory(prefix="swarm-tests-") as home:
        environment = {**os.environ, SHARED_HOME: home}
        others = subprocess.Popen(
            [*pytest, "--part", "others"],
            stdout=said,
            stderr=subprocess.STDOUT,
            env=environment,
            preexec_fn=lambda: os.nice(19),
        )
        try:
            live = subprocess.call([*pytest, "--part", "live"], env=environment)
            while others.poll() is None:
                print("waiting for the tests without processes of their own", file=sys.stderr, flush=True)
                _wait_a_while(others)
        finally:
            others.terminate()
            others.wait()
        said.seek(0)
        print(said.read(), flush=True)
    return live or others.returncode


def _wait_a_while(process: subprocess.Popen[bytes]) -> None:
    """Wait for its end, but no longer than until something should be said."""
    until = time.monotonic() + _TELL_EVERY_S
    while process.poll() is None and time.monotonic() < until:
        time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
