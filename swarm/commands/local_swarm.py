"""A whole swarm on this machine: a bootstrap peer and some servers, each a real process, on loopback by default."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from swarm.errors import SwarmError
from swarm.transport.daemon import die_with_parent

READY_TIMEOUT_S = 180.0
"""How long a peer may take to become ready: loading a model is part of it."""
_STOP_TIMEOUT_S = 20.0
_WAIT_S = 0.25


class Host(Protocol):
    """Where a peer runs: this machine, or a part of it with a network of its own."""

    @property
    def address(self) -> str:
        """The IP address to listen on."""

    def start(self, arguments: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """``subprocess.Popen(arguments, **options)`` there."""


@dataclass(frozen=True)
class Loopback:
    """This machine; peers elsewhere cannot reach it."""

    address: str = "127.0.0.1"

    def start(self, arguments: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """An ordinary child process."""
        with _interrupted_later():
            return subprocess.Popen(arguments, **options)


@contextlib.contextmanager
def _interrupted_later() -> Iterator[None]:
    """Let a Ctrl-C take effect at the end: where Python forks it may be swallowed ("Exception ignored in …")."""
    usual = signal.getsignal(signal.SIGINT)
    if usual is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupts: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if interrupts:
        raise KeyboardInterrupt


_LOOPBACK = Loopback()


@dataclass
class LocalPeer:
    """One child process that reports its events as JSON lines."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    """What it wrote to stderr."""
    ready: dict[str, Any] | None = None
    """Its ``ready`` event."""
    _unread: bytes = b""

    @property
    def peer_id(self) -> str:
        return str(self.ready["peer_id"]) if self.ready else ""

    @property
    def addresses(self) -> list[str]:
        return list(self.ready["addresses"]) if self.ready else []

    @property
    def at_work_on(self) -> str:
        """What the last progress bar that it drew is about; empty: it has drawn none."""
        lines = re.split(r"[\r\n]+", self.log.read_text(errors="replace"))
        return next((line.partition(":")[0] for line in reversed(lines) if "%|" in line), "")

    def wait_until_ready(
        self, timeout_s: float = READY_TIMEOUT_S, on_wait: Callable[[], object] = lambda: None
    ) -> None:
        """Wait for its ``ready`` event.

        Args:
            on_wait: called now and then meanwhile.

        Raises:
            SwarmError: the process ended instead, or is not ready after `timeout_s`; with the end of its log.
        """
        deadline = time.monotonic() + timeout_s
        while (line := self._read_line(deadline, on_wait)) is not None:
            if not line:
                code = self.process.wait()
                raise SwarmError(f"{self.name} ended with code {code} instead of becoming ready{self._last_words()}")
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if event.get("event") == "ready":
                    self.ready = event
                    return
        raise SwarmError(f"{self.name} was not ready within {timeout_s:g} s{self._last_words()}")

    def kill(self) -> None:
        """SIGKILL: no farewell."""
        self.process.kill()
        self.process.wait()

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def _read_line(self, deadline: float, on_wait: Callable[[], object]) -> bytes | None:
        """The next line of its output, empty at the end of all lines; None if none is complete at `deadline`."""
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                left_s = deadline - time.monotonic()
                if not selector.select(max(0.0, min(left_s, _WAIT_S))):
                    if left_s <= _WAIT_S:
                        return None
                    on_wait()
                    continue
                data = os.read(self.process.stdout.fileno(), 65536)
                if not data:
                    return b""
                self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return line + b"\n"

    def _last_words(self) -> str:
        tail = self.log.read_text(errors="replace").splitlines()[-15:]
        return "; it printed last:\n" + "\n".join(tail) if tail else "; it printed nothing"


class LocalSwarm:
    """Starts and stops the processes; a context manager.

    On Linux a process also ends with the thread that started it, so that nothing outlives a killed parent.

    Attributes:
        bootstrap: the peer through which the others join.
        servers, gateways: in the order in which they were started.
    """

    def __init__(self, host: Host = _LOOPBACK) -> None:
        """Start the bootstrap peer on `host`, where servers go too unless they are told otherwise, and wait for it."""
        self._host = host
        self.servers: list[LocalPeer] = []
        self.gateways: list[LocalPeer] = []
        self._directory = tempfile.TemporaryDirectory(prefix="swarm-local-")
        self.bootstrap = self._start(host, "bootstrap", ["-m", "swarm.commands.main", "bootstrap"])
        try:
            self.bootstrap.wait_until_ready()
        except BaseException:
            self.stop()
            raise

    @property
    def initial_peers(self) -> list[str]:
        """For ``--initial-peers`` and ``initial_peers=``."""
        return self.bootstrap.addresses

    def start_server(
        self,
        model: str,
        *arguments: str,
        wait: bool = True,
        ready_timeout_s: float = READY_TIMEOUT_S,
        host: Host | None = None,
        program: str = "swarm.commands.server",
    ) -> LocalPeer:
        """Start ``swarm-server MODEL …`` (the module `program`) and, unless told not to, wait until it serves."""
        peer = self._start(
            host or self._host,
            f"server {len(self.servers) + 1}",
            ["-m", program, model, *arguments, "--initial-peers", *self.initial_peers],
        )
        self.servers.append(peer)
        if wait:
            peer.wait_until_ready(ready_timeout_s)
        return peer

    def start_servers(
        self,
        model: str,
        spans: Sequence[str],
        *arguments: str,
        on_ready: Callable[[LocalPeer], object] = lambda _: None,
        on_wait: Callable[[LocalPeer], object] = lambda _: None,
    ) -> list[LocalPeer]:
        """Start one server for each span (``"0:15"``), all at once, and wait for all.

        Args:
            on_wait: called now and then, with one that is not ready yet.
        """
        peers = [self.start_server(model, "--blocks", span, *arguments, wait=False) for span in spans]
        for peer in peers:
            peer.wait_until_ready(on_wait=functools.partial(on_wait, peer))
            on_ready(peer)
        return peers

    def start_gateway(self, *arguments: str) -> LocalPeer:
        """Start ``swarm api`` with these arguments, on any free port, and wait until it serves."""
        command = ["-m", "swarm.commands.main", "api", *arguments, "--initial-peers", *self.initial_peers]
        gateway = self._spawn(self._host, f"gateway {len(self.gateways) + 1}", [*command, "--port", "0", "--json"])
        self.gateways.append(gateway)
        gateway.wait_until_ready()
        return gateway

    def server(self, peer_id: str) -> LocalPeer:
        """The server with this peer id."""
        return next(peer for peer in self.servers if peer.peer_id == peer_id)

    def stop(self) -> None:
        """End every process: politely, then not."""
        peers = [*self.gateways, *self.servers, self.bootstrap]
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

    def _start(self, host: Host, name: str, arguments: Sequence[str]) -> LocalPeer:
        return self._spawn(host, name, [*arguments, "--host", host.address, "--private-network", "--json"])

    def _spawn(self, host: Host, name: str, arguments: Sequence[str]) -> LocalPeer:
        log = Path(self._directory.name) / f"{name.replace(' ', '-')}.log"
        with log.open("w") as stderr:
            process = host.start(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,  # Ctrl-C is for the parent, which then stops its children
                preexec_fn=die_with_parent(os.getpid()),
            )
        return LocalPeer(name, process, log)
