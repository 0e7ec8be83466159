"""Run hivemind's ``p2pd`` for exactly as long as this process lives.

hivemind would start the daemon by itself, but then it outlives a parent that was killed, dies of the
terminal's Ctrl-C before its parent can say goodbye, puts its control socket where any user of the machine
can reach it, and shares a taken port without a word. So we start it, and hivemind attaches to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

from swarm.errors import PeerError, PortTaken
from swarm.transport.lean_hivemind import Multiaddr

_START_TIMEOUT_S = 20.0
_PR_SET_PDEATHSIG = 1


class P2pDaemon:
    """A running ``p2pd``. Start it with :meth:`start`, end it with :meth:`stop`."""

    def __init__(self, process: asyncio.subprocess.Process, directory: Path, output: asyncio.Task[None]) -> None:
        self._process, self._directory, self._output = process, directory, output

    @property
    def control_address(self) -> Multiaddr:
        """Where hivemind attaches."""
        return Multiaddr(f"/unix{self._directory / 'control.sock'}")

    @property
    def pid(self) -> int:
        return self._process.pid

    @classmethod
    async def start(
        cls,
        identity_path: Path,
        listen: Sequence[str],
        *,
        announce: Sequence[str] = (),
        client_only: bool = False,
        public_network: bool = False,
    ) -> P2pDaemon:
        """Start the daemon and wait until it takes commands.

        On Linux it also dies with the *thread* that runs this event loop: let the loop end after :meth:`stop`.

        Args:
            listen: multiaddrs; port 0 means any.
            announce: multiaddrs to tell others instead of those listened on.
            client_only: take no part in routing for others.
            public_network: look for a NAT to open and for relays.

        Raises:
            PortTaken: another program uses a port of `listen`.
            PeerError: the daemon did not start, with what it said.
        """
        for address in listen:
            _check_port_is_free(address)
        try:
            directory = Path(tempfile.mkdtemp(prefix="swarm-p2pd-"))
        except OSError as error:
            raise PeerError(f"There is no room for p2pd's control socket: {error}") from error
        executable = resources.files("hivemind") / "hivemind_cli" / "p2pd"
        arguments = [
            f"-listen=/unix{directory / 'control.sock'}",
            f"-id={identity_path}",
            "-dhtClient=1" if client_only else "-dhtServer=1",
            "-tls=1",
            "-connManager=1",
            "-relay=1",
            f"-autonat={int(public_network)}",
            f"-natPortMap={int(public_network)}",
            f"-autoRelay={int(public_network)}",
        ]
        arguments += [f"-hostAddrs={','.join(listen)}"] if listen else ["-noListenAddrs=1"]
        arguments += [f"-announceAddrs={','.join(announce)}"] if announce else []
        ours = {"GOLOG_LOG_FMT": "json", "GOLOG_LOG_LEVEL": "error"}
        environment = {"GOMEMLIMIT": "96MiB", "GOGC": "20", **os.environ, **ours}
        try:
            process = await asyncio.create_subprocess_exec(
                str(executable),
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # the terminal's Ctrl-C is for us, not for the daemon
                preexec_fn=die_with_parent(os.getpid()),
            )
        except OSError as error:
            shutil.rmtree(directory, ignore_errors=True)
            raise PeerError(f"p2pd, which comes with hivemind, cannot be run on this machine: {error}") from error
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        output = asyncio.create_task(_read_output(process, ready))
        daemon = cls(process, directory, output)
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                await ready
        except BaseException as error:
            await daemon.stop()
            if isinstance(error, TimeoutError):
                raise PeerError(f"p2pd did not start within {_START_TIMEOUT_S:.0f} s") from error
            raise
        return daemon

    async def stop(self) -> None:
        """End the daemon and remove its sockets."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            try:
                async with asyncio.timeout(2):
                    await self._process.wait()
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    self._process.kill()
                await self._process.wait()
        self._output.cancel()
        shutil.rmtree(self._directory, ignore_errors=True)


def die_with_parent(parent: int) -> Callable[[], None] | None:
    """A ``preexec_fn``: Linux will kill the child when the thread that started it ends, in whatever way (prctl(2))."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def arm() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the kernel was told
            os._exit(1)

    return arm


async def _read_output(process: asyncio.subprocess.Process, ready: asyncio.Future[None]) -> None:
    assert process.stdout is not None
    last_line = "nothing"
    while line := await process.stdout.readline():
        text = line.decode(errors="replace").strip()
        if text.startswith("Peer ID:") and not ready.done():
            ready.set_result(None)
        with contextlib.suppress(ValueError, KeyError, TypeError):
            text = json.loads(text)["msg"]
        last_line = text or last_line
    if not ready.done():
        ready.set_exception(PeerError(f"p2pd did not start; it said: {last_line}"))


def _check_port_is_free(address: str) -> None:
    """p2pd shares ports (SO_REUSEPORT), so a taken one would silently steal another program's connections."""
    parts = address.strip("/").split("/")
    if len(parts) < 4 or parts[0] not in ("ip4", "ip6") or parts[2] not in ("tcp", "udp") or parts[3] == "0":
        return
    family = socket.AF_INET if parts[0] == "ip4" else socket.AF_INET6
    kind = socket.SOCK_STREAM if parts[2] == "tcp" else socket.SOCK_DGRAM
    with socket.socket(family, kind) as probe:
        if kind is socket.SOCK_STREAM:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((parts[1], int(parts[3])))
        except OSError as error:
            raise PortTaken(
                f"Cannot listen on {parts[1]}, {parts[2]} port {parts[3]}: {error.strerror}. "
                "Choose another with --port, or stop the program that uses it."
            ) from error
