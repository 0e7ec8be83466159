"""A whole swarm on this machine: a bootstrap peer and some servers, each a real process on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from swarm.errors import SwarmError
from swarm.transport.daemon import die_with_parent

_STOP_TIMEOUT_S = 20.0


@dataclass
class LocalPeer:
    """One child process that reports its events as JSON lines."""

    name: str
    process: subprocess.Popen[str]
    log: Path
    """What it wrote to stderr."""
    ready: dict[str, Any] | None = None
    """Its ``ready`` event."""

    @property
    def peer_id(self) -> str:
        return str(self.ready["peer_id"]) if self.ready else ""

    @property
    def addresses(self) -> list[str]:
        return list(self.ready["addresses"]) if self.ready else []

    def wait_until_ready(self) -> None:
        """Raises SwarmError, with the end of its log, if the process ends instead."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if event.get("event") == "ready":
                    self.ready = event
                    return
        self.process.wait()
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
        raise SwarmError(f"{self.name} ended with code {self.process.returncode} instead of becoming ready:\n{tail}")

    def kill(self) -> None:
        """SIGKILL: no farewell."""
        self.process.kill()
        self.process.wait()

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


class LocalSwarm:
    """Starts and stops the processes; a context manager.

    On Linux a process also ends with the thread that started it, so that nothing outlives a killed parent.

    Attributes:
        bootstrap: the peer through which the others join.
        servers: in the order in which they were started.
    """

    def __init__(self) -> None:
        self.servers: list[LocalPeer] = []
        self._directory = tempfile.TemporaryDirectory(prefix="swarm-local-")
        self.bootstrap = self._start("bootstrap", ["-m", "swarm.commands.main", "bootstrap", "--host", "127.0.0.1"])
        self.bootstrap.wait_until_ready()

    @property
    def initial_peers(self) -> list[str]:
        """For ``--initial-peers`` and ``initial_peers=``."""
        return self.bootstrap.addresses

    def start_server(self, model: str, *arguments: str, wait: bool = True) -> LocalPeer:
        """Start ``swarm-server MODEL …`` and (unless told not to) wait until it serves."""
        peer = self._start(
            f"server {len(self.servers) + 1}",
            ["-m", "swarm.commands.server", model, *arguments]
            + ["--host", "127.0.0.1", "--initial-peers", *self.initial_peers],
        )
        self.servers.append(peer)
        if wait:
            peer.wait_until_ready()
        return peer

    def start_servers(
        self, model: str, spans: Sequence[str], *arguments: str, on_ready: Callable[[LocalPeer], None] = lambda _: None
    ) -> list[LocalPeer]:
        """Start one server for each span (``"0:15"``), all at once, and wait for all."""
        peers = [self.start_server(model, "--blocks", span, *arguments, wait=False) for span in spans]
        for peer in peers:
            peer.wait_until_ready()
            on_ready(peer)
        return peers

    def server(self, peer_id: str) -> LocalPeer:
        """The server with this peer id."""
        return next(peer for peer in self.servers if peer.peer_id == peer_id)

    def stop(self) -> None:
        """End every process: politely, then not."""
        peers = [*self.servers, self.bootstrap]
        for peer in peers:
            with contextlib.suppress(ProcessLookupError):
                peer.process.terminate()
                peer.process.send_signal(signal.SIGCONT)
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        for peer in peers:
            try:
                peer.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                peer.kill()
        self._directory.cleanup()

    def __enter__(self) -> LocalSwarm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _start(self, name: str, arguments: Sequence[str]) -> LocalPeer:
        log = Path(self._directory.name) / f"{name.replace(' ', '-')}.log"
        with log.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, *arguments, "--json"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,  # Ctrl-C is for the parent, which then stops its children
                preexec_fn=die_with_parent(os.getpid()),
            )
        return LocalPeer(name, process, log)
