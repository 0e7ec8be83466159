"""What a server says of itself: one announcement, renewed for as long as it is there."""

from __future__ import annotations

import time

from swarm import __version__
from swarm.dht import Announcement, Directory, State, precision_name
from swarm.dht.expert_announcement import bitmap_of
from swarm.placement import Span
from swarm.protocol.tensors import dtype_name
from swarm.server.announcer import Announcer
from swarm.server.experts.dispatch import ExpertDispatch
from swarm.server.neighbours import NetworkSpeed
from swarm.server.preparation import Prepared
from swarm.server.sessions import SessionTable
from swarm.server.settings import ServerSettings
from swarm.server.throughput import ComputeSpeed
from swarm.transport.node import Node


class Presence:
    """A server in the directory. Set what has changed, then :meth:`announce` (or :meth:`renew_soon`).

    Attributes:
        bounds: the span that it has loaded, is loading, or drains. Setting it makes it all hosted.
        focus: the part of it that is hosted: new sessions are to come there. Those on the rest go on.
        tentative: it may still choose another one, before it has loaded any.
        table: of its sessions; None while nothing is loaded.
        block_digests: of all that is loaded, or nothing.
        speed: as measured last, through all of it: of the span before while it loads another.
        routed: blocks whose routed experts are not all here, and those of them that are.
        experts: those that are elsewhere.
    """

    def __init__(self, settings: ServerSettings, prepared: Prepared, node: Node, directory: Directory) -> None:
        self._settings, self._prepared, self._node = settings, prepared, node
        self._announcer = Announcer(
            node,
            directory,
            settings.initial_peers,
            self._announcement,
            prepared.checkpoint.num_blocks,
            {block: tensors.count for block, (tensors, _) in prepared.routed.items()},
        )
        self.state = State.JOINING
        self.bounds: Span = (0, 0)
        self.tentative = False
        self.moves = 0
        self.block_digests: tuple[str, ...] = ()
        self.table: SessionTable | None = None
        self.speed: ComputeSpeed | None = None
        self.network = NetworkSpeed()
        self.routed = prepared.routed
        self.experts: ExpertDispatch | None = None

    @property
    def bounds(self) -> Span:
        return self._bounds

    @bounds.setter
    def bounds(self, bounds: Span) -> None:
        self._bounds = self.focus = bounds

    @property
    def precision(self) -> str:
        """As :attr:`Announcement.precision`."""
        return precision_name(dtype_name(self._prepared.dtype), self._settings.quantization or "")

    def renew_soon(self) -> None:
        """Something has changed, and there is no hurry: :meth:`keep_announced` will say so."""
        self._announcer.renew_soon()

    async def announce(self) -> tuple[Announcement, bool]:
        """Tell everybody now; returns what was said, and whether any node of the directory stored it."""
        return await self._announcer.announce()

    async def withdraw(self) -> None:
        """Tell everybody that this server has left."""
        self.state = State.OFFLINE
        await self.announce()

    async def keep_announced(self) -> None:
        """Renew the announcement for ever; find the way back into the swarm if it is lost."""
        await self._announcer.keep_announced()

    def _announcement(self, addresses: tuple[str, ...]) -> Announcement:
        checkpoint, (first, last), (start, end) = self._prepared.checkpoint, self.bounds, self.focus
        routed = {block: kept for block, (_, kept) in self.routed.items() if start <= block < end}
        elsewhere_s = len(routed) * self.experts.usual_s if self.experts is not None else 0.0
        speed = self.speed.of_part((end - start) / (last - first)).slowed(elsewhere_s) if self.speed else None
        decode = dict(speed.decode_steps_per_s) if speed else {}
        return Announcement(
            peer_id=self._node.peer_id,
            model=checkpoint.model_digest,
            model_name=self._settings.model[-96:],
            state=self.state,
            num_blocks=checkpoint.num_blocks,
            start=start,
            end=end,
            loaded=self.bounds if self.focus != self.bounds else None,
            block_digests=self.block_digests[start - first : end - first],
            kept_experts={block: bitmap_of(kept).hex() for block, kept in routed.items()},
            dtype=dtype_name(self._prepared.dtype),
            quantization=self._settings.quantization or "",
            throughput=decode.get(1, 0.0),
            decode_steps_per_s=decode,
            prefill_tokens_per_s=speed.prefill_tokens_per_s if speed else None,
            rtts_s=dict(self.network.rtts_s),
            upload_bytes_per_s=self.network.upload_bytes_per_s,
            download_bytes_per_s=self.network.download_bytes_per_s,
            free_kv_tokens=self.table.free_tokens if self.table else self._prepared.plan.kv_tokens,
            sessions=len(self.table) if self.table else 0,
            moves=self.moves,
            tentative=self.tentative,
            addresses=addresses,
            version=__version__,
            public_name=self._settings.public_name,
            issued_at=time.time(),
        )
