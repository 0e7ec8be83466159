"""A client's membership in the swarm: one node, one directory, many models and sessions."""

from __future__ import annotations

import weakref
from contextlib import AbstractAsyncContextManager

from swarm.client.server_view import ServerView
from swarm.client.session import Session
from swarm.client.settings import ClientSettings
from swarm.dht import Announcement, Directory, ExpertAnnouncement
from swarm.models import Checkpoint
from swarm.transport.node import Node


class Network:
    """Joined to a swarm as a client. Make it with :meth:`join`, end it with :meth:`leave`."""

    def __init__(self, node: Node, directory: Directory, settings: ClientSettings) -> None:
        self._node, self._directory, self._settings = node, directory, settings
        self._views: dict[tuple[str, str], ServerView] = {}
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()

    @classmethod
    async def join(cls, settings: ClientSettings) -> Network:
        """Join through the initial peers.

        Raises:
            BootstrapFailed: none of them answered, or none were given.
        """
        node = await Node.start(client_only=True)
        try:
            directory = await Directory.join(node, settings.initial_peers, client_only=True)
        except BaseException:
            await node.stop()
            raise
        return cls(node, directory, settings)

    @property
    def peer_id(self) -> str:
        """Of this client."""
        return self._node.peer_id

    def session(self, checkpoint: Checkpoint, dtype: str, max_length: int) -> Session:
        """A new session on `checkpoint`; servers are contacted with its first step.

        Args:
            dtype: the precision that the servers are to compute in, e.g. ``"float32"``.
            max_length: positions to make room for; it grows beyond if servers have more.
        """
        key = (checkpoint.model_digest, dtype)
        if key not in self._views:
            self._views[key] = ServerView(self._node, self._directory, checkpoint, dtype, self._settings)
        session = Session(self._node, self._views[key], checkpoint, dtype, self._settings, max_length)
        self._sessions.add(session)
        return session

    async def servers(self, model_digest: str) -> list[Announcement]:
        """The announcements of a model's servers, as they are now."""
        return await self._directory.servers(model_digest)

    async def experts(self, model_digest: str) -> list[ExpertAnnouncement]:
        """Likewise of its servers of experts."""
        return await self._directory.experts(model_digest)

    def while_daemon_lives(self) -> AbstractAsyncContextManager[None]:
        """What is done in it is broken off, and DaemonDied raised, as soon as nobody else can be reached any more."""
        return self._node.while_daemon_lives()

    async def leave(self) -> None:
        """Close every session and connection."""
        for session in list(self._sessions):
            await session.close()
        await self._directory.leave()
        await self._node.stop()
