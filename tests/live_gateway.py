"""A gateway for tests: a real process in front of a real swarm."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from warm_start import WarmLoopback

from swarm.commands.local_swarm import LocalPeer, LocalSwarm


@dataclass(frozen=True)
class LiveGateway:
    """What tests ask of it."""

    peer: LocalPeer
    url: str
    warm: WarmLoopback

    def health(self) -> dict[str, Any]:
        """Its own word on how busy it is."""
        with urllib.request.urlopen(f"{self.url}/health", timeout=5) as response:
            return dict(json.load(response))

    def idle_within_s(self, seconds: float) -> bool:
        """Whether no request runs or waits, soon."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            health = self.health()
            if health["running"] == health["waiting"] == 0:
                return True
            time.sleep(0.02)
        return False

    def metric(self, name: str) -> float:
        """A number that Prometheus would read."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=5) as response:
            lines = response.read().decode().splitlines()
        return float(next(line for line in lines if line.startswith(f"swarm_gateway_{name} ")).split()[-1])

    def run_another(self, swarm: LocalSwarm, *arguments: str) -> tuple[int, str]:
        """The exit code and stderr of one that is not expected to live."""
        with tempfile.TemporaryFile() as log:
            process = self.warm.start(
                _command(swarm, *arguments), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log
            )
            code = process.wait(60)
            log.seek(0)
            return code, log.read().decode()


@contextlib.contextmanager
def start_gateway(swarm: LocalSwarm, warm: WarmLoopback, *arguments: str) -> Iterator[LiveGateway]:
    """``swarm api`` with these arguments, on any free port, until the end of the context."""
    peer = swarm.start_gateway(*arguments)
    assert peer.ready is not None
    yield LiveGateway(peer, str(peer.ready["url"]), warm)
    peer.process.terminate()
    assert peer.process.wait(15) == 0, peer.log.read_text()


def _command(swarm: LocalSwarm, *arguments: str) -> list[str]:
    peers = ["--initial-peers", *swarm.initial_peers]
    return [sys.executable, "-m", "swarm.commands.main", "api", *arguments, *peers, "--json"]
