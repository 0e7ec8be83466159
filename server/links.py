"""A link: the stream over which a server sends what it has computed to its successor in a session."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import torch

from swarm.errors import PeerUnreachable, ProtocolError
from swarm.page_names import PAGE
from swarm.protocol.messages import LINK_PROTOCOL, Attach, Attached, Link, Message
from swarm.transport.node import Node
from swarm.transport.watched_stream import WatchedStream

_ATTACH_TIMEOUT_S = 5.0


class OutgoingLink:
    """Attaches to a successor's session; :meth:`run` until it fails or is cancelled."""

    def __init__(self, node: Node, link: Link, prefix: Sequence[bytes] = ()) -> None:
        """
        Args:
            prefix: names of the pages that will come first, if that is known.
        """
        assert link.peer_id is not None and link.session is not None
        self._stream = WatchedStream(node, link.peer_id, link.addresses, LINK_PROTOCOL)
        self._attach = Attach(session=link.session, prefix=list(prefix))

    @property
    def one_way_s(self) -> float | None:
        """How long the way to the successor takes, as the last pings showed it."""
        return self._stream.one_way_s

    def send(self, message: Message, tensors: dict[str, torch.Tensor]) -> None:
        """Send a message to the successor."""
        self._stream.send(message, tensors)

    async def run(self, on_open: Callable[[Attached, int], None]) -> None:
        """Dial, attach, and watch over the link.

        Args:
            on_open: is told what the successor has of the session, and how many positions of the prefix it knows.

        Raises:
            PeerError: why the link does not stand, or not any more.
        """
        attached = False

        def take(message: Message, _: dict[str, torch.Tensor]) -> None:
            nonlocal attached
            if attached or not isinstance(message, Attached):
                raise ProtocolError(f"{self._stream.peer_id} sent {message.type!r} over a link")
            attached = True
            attaching.reschedule(None)
            on_open(message, min(message.known, len(self._attach.prefix)) * PAGE)

        self._stream.send(self._attach)
        try:
            async with asyncio.timeout(_ATTACH_TIMEOUT_S) as attaching:
                await self._stream.run(take)
        except TimeoutError:
            raise PeerUnreachable(f"{self._stream.peer_id} let nobody attach for {_ATTACH_TIMEOUT_S:g} s") from None
