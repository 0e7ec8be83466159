"""A server's membership in the swarm: a node and its part of the directory, for as long as the server lives."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from swarm.dht import Directory
from swarm.errors import SwarmError
from swarm.server.compute import ComputeThread
from swarm.server.settings import ServerSettings
from swarm.transport.identity import Identity
from swarm.transport.node import Node

logger = logging.getLogger(__name__)

_LAST_WORK_S = 10.0
"""A server that leaves waits so long for what it computes, or loads, to end."""


@asynccontextmanager
async def membership(settings: ServerSettings, compute: ComputeThread) -> AsyncIterator[tuple[Node, Directory]]:
    """Join; at the end leave, and stop `compute`.

    Raises:
        BootstrapFailed, PortTaken, PeerError: the swarm cannot be joined.
    """
    identity = Identity.load_or_create(settings.identity) if settings.identity else None
    node = await Node.start(
        identity=identity,
        listen=settings.listen,
        announce=settings.announce,
        public_network=settings.public_network,
    )
    try:
        directory = await Directory.join(node, settings.initial_peers)
        try:
            yield node, directory
        finally:
            await directory.leave()
    finally:
        compute.stop()
        await node.stop()
        if not await compute.ended(_LAST_WORK_S):
            logger.warning("the computation at hand did not end within %.0f s", _LAST_WORK_S)


async def fail_with_compute(compute: ComputeThread) -> None:
    """Raise as soon as nothing can be computed any more: whoever waits had better go elsewhere."""
    reason = await compute.failed()
    raise SwarmError(f"the thread of this server that computes has failed ({reason}); start the server again")
