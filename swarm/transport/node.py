"""This process's node in the libp2p network: dial peers, accept their streams."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass

from swarm.errors import BootstrapFailed, DaemonDied, PeerUnreachable, first_of
from swarm.transport.daemon import P2pDaemon
from swarm.transport.daemon_connection import DaemonConnection
from swarm.transport.identity import Identity
from swarm.transport.lean_hivemind import P2P, Multiaddr, P2PDaemonError, P2PHandlerError, PeerID, StreamInfo

logger = logging.getLogger(__name__)

StreamHandler = Callable[[str, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
"""Called with (peer id, reader, writer) for every stream that a peer opens; the stream is closed when it returns."""

_DIAL_FAILURES = (P2PDaemonError, P2PHandlerError, OSError, asyncio.IncompleteReadError)


@dataclass(frozen=True)
class PeerAddress:
    """A multiaddr that ends in ``/p2p/<peer id>``."""

    multiaddr: str

    @property
    def peer_id(self) -> str:
        """Raises ValueError if the multiaddr names no peer."""
        try:
            return str(Multiaddr(self.multiaddr)["p2p"])
        except Exception as error:  # multiaddr raises errors of many kinds
            raise ValueError(
                f"{self.multiaddr!r} is not a peer's address; it should look like "
                "/ip4/203.0.113.5/tcp/31337/p2p/12D3KooW…"
            ) from error


class Node:
    """A libp2p host. Make it with :meth:`start`, end it with :meth:`stop`."""

    def __init__(self, identity: Identity, daemon: P2pDaemon, p2p: P2P, temporary_identity: bool) -> None:
        self.identity = identity
        self.p2p = p2p
        """hivemind's handle on the daemon, for the DHT."""
        self._daemon = daemon
        self._connection = DaemonConnection(p2p)
        self._temporary_identity = temporary_identity

    @classmethod
    async def start(
        cls,
        *,
        identity: Identity | None = None,
        listen: Sequence[str] = (),
        announce: Sequence[str] = (),
        client_only: bool = False,
        public_network: bool = False,
    ) -> Node:
        """Start a node; see :meth:`P2pDaemon.start` for the arguments and errors.

        Args:
            identity: default: a fresh one, forgotten at the end.
        """
        own = identity or Identity.temporary()
        daemon = await P2pDaemon.start(
            own.path, listen, announce=announce, client_only=client_only, public_network=public_network
        )
        try:
            p2p = await P2P.replicate(daemon.control_address)
        except BaseException:
            await daemon.stop()
            raise
        return cls(own, daemon, p2p, temporary_identity=identity is None)

    @property
    def peer_id(self) -> str:
        return self.identity.peer_id

    @property
    def daemon_pid(self) -> int:
        return self._daemon.pid

    async def addresses(self) -> list[str]:
        """The multiaddrs under which others may reach this node, each ending in its peer id."""
        with contextlib.suppress(ValueError):
            return [str(address) for address in await self.p2p.get_visible_maddrs(latest=True)]
        return []

    async def connect(self, peer_id: str, addresses: Sequence[str], *, timeout_s: float = 5.0) -> None:
        """Make sure that there is a connection to a peer, trying `addresses` and what the network knows of it.

        Raises:
            PeerUnreachable: none worked in time.
        """
        maddrs = []
        for address in addresses:
            with contextlib.suppress(Exception):  # a stranger wrote it; a bad one is not worth an error
                maddrs.append(Multiaddr(address).decapsulate(f"/p2p/{peer_id}"))
        try:
            async with asyncio.timeout(timeout_s):
                await self.p2p._client.connect(PeerID.from_base58(peer_id), maddrs)
        except TimeoutError:
            raise PeerUnreachable(f"{peer_id} did not answer within {timeout_s:g} s") from None
        except ValueError as error:  # a stranger wrote the id, too
            raise PeerUnreachable(f"{peer_id!r} is not a peer id: {error}") from None
        except _DIAL_FAILURES as error:
            raise PeerUnreachable(f"{peer_id} cannot be dialled: {error}") from error

    async def bootstrap(self, initial_peers: Sequence[str], *, timeout_s: float = 10.0) -> list[str]:
        """Connect to the peers through which one joins the swarm; at least one must answer.

        Returns:
            The addresses that answered.

        Raises:
            BootstrapFailed: none did, with the reason for each.
            ValueError: an address is malformed.
        """
        peers = [(PeerAddress(address).peer_id, address) for address in initial_peers]
        results = await asyncio.gather(
            *(self.connect(peer_id, [address], timeout_s=timeout_s) for peer_id, address in peers),
            return_exceptions=True,
        )
        failures = [f"  {address}: {result}" for (_, address), result in zip(peers, results, strict=True) if result]
        if len(failures) == len(peers):
            raise BootstrapFailed(
                "None of the initial peers answered:\n"
                + "\n".join(failures)
                + "\nCheck the addresses, and that `swarm bootstrap` (or a server) runs there."
            )
        return [address for (_, address), result in zip(peers, results, strict=True) if not result]

    async def open_stream(
        self, peer_id: str, protocol: str, *, timeout_s: float = 5.0
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a raw stream to a connected peer.

        Raises:
            PeerUnreachable: the peer is gone, or does not speak `protocol`.
        """
        try:
            async with asyncio.timeout(timeout_s):
                _, reader, writer = await self.p2p.call_binary_stream_handler(PeerID.from_base58(peer_id), protocol)
        except TimeoutError:
            raise PeerUnreachable(f"{peer_id} opened no stream within {timeout_s:g} s") from None
        except _DIAL_FAILURES as error:
            raise PeerUnreachable(f"{peer_id} opened no stream: {error}") from error
        return reader, writer

    async def serve(self, protocol: str, handler: StreamHandler) -> None:
        """Have `handler` called for every stream that peers open with `protocol`."""

        async def handle(info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await handler(str(info.peer_id), reader, writer)
            except (ConnectionError, asyncio.IncompleteReadError):
                logger.debug("%s hung up", info.peer_id)
            finally:
                writer.close()

        await self.p2p.add_binary_stream_handler(protocol, handle)

    def check_daemon(self) -> None:
        """Raises DaemonDied if p2pd has died, or can be reached no longer."""
        if not self._connection.is_open:
            raise DaemonDied("p2pd, the network daemon of this program, has died; start the program again")

    async def fail_with_daemon(self) -> None:
        """Raises DaemonDied as soon as p2pd has died, or can be reached no longer."""
        await self._connection.ended()
        self.check_daemon()

    @contextlib.asynccontextmanager
    async def while_daemon_lives(self) -> AsyncIterator[None]:
        """What is done in it is broken off, and DaemonDied raised, as soon as p2pd has died."""
        try:
            async with asyncio.TaskGroup() as tasks:
                watching = tasks.create_task(self.fail_with_daemon())
                yield
                watching.cancel()
        except BaseExceptionGroup as group:
            raise first_of(group) from None

    async def stop(self) -> None:
        """Close every connection and end the daemon."""
        await self.p2p.shutdown()
        await self._daemon.stop()
        if self._temporary_identity:
            shutil.rmtree(self.identity.path.parent, ignore_errors=True)
