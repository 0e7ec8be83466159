"""A server's life: join, load, serve, move, drain, leave."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping

from torch import nn

from swarm.dht import Announcement, Directory, State
from swarm.errors import SwarmError
from swarm.models.experts import routed_experts
from swarm.placement import Move
from swarm.protocol.messages import LINK_PROTOCOL, STREAM_PROTOCOL
from swarm.protocol.tensors import dtype_name
from swarm.server.compute import ComputeThread
from swarm.server.experts.dispatch import ExpertDispatch
from swarm.server.experts.own import OwnExperts
from swarm.server.hosted_span import HostedSpan, load_hosted_span
from swarm.server.membership import fail_with_compute, membership
from swarm.server.neighbours import NetworkSpeed
from swarm.server.network_speed import NetworkMeasurement
from swarm.server.preparation import Prepared
from swarm.server.presence import Presence
from swarm.server.rebalancing import Rebalancing
from swarm.server.resident_memory import free_memory, share_one_heap
from swarm.server.session_stream import Host
from swarm.server.settings import ServerSettings
from swarm.server.step_runner import StepRunner
from swarm.server.streams import StreamServer
from swarm.transport.measuring import MEASURE_PROTOCOL, MeasuringServer
from swarm.transport.node import Node

logger = logging.getLogger(__name__)

_RELOAD_FAILURES = (SwarmError, OSError, MemoryError, RuntimeError)
"""torch reports that memory is exhausted as a RuntimeError."""

_SAY_SO_WITHIN_S = 2.0
"""A directory that does not answer keeps nobody's sessions waiting for longer."""


class Server:
    """One server. :meth:`run` does everything, from joining to leaving."""

    def __init__(self, settings: ServerSettings, prepared: Prepared) -> None:
        self._settings, self._prepared = settings, prepared
        share_one_heap()
        self._compute = ComputeThread(settings.threads)
        self._leave = asyncio.Event()
        self._hosted: HostedSpan | None = None
        self._own_experts: OwnExperts | None = None
        self._experts: ExpertDispatch | None = None
        self._abandoned = threading.Event()

    def leave(self) -> None:
        """Begin to drain; :meth:`run` returns when that is done."""
        self._leave.set()

    async def run(
        self,
        on_ready: Callable[[Announcement], None] = lambda _: None,
        on_network: Callable[[NetworkSpeed], None] = lambda _: None,
        on_move: Callable[[Announcement, Move], None] = lambda _, __: None,
    ) -> None:
        """Join the swarm, load, serve until :meth:`leave`, drain and leave.

        Args:
            on_ready: called with the first announcement in which the server is online.
            on_network: called whenever the ways to other servers have been measured.
            on_move: called when the server has moved to other blocks, or hosts another part of those that it has
                loaded, with the announcement that says so.

        Raises:
            BootstrapFailed, PortTaken, PeerError: the swarm cannot be joined.
            CorruptCheckpoint: the weights cannot be loaded.
        """
        async with membership(self._settings, self._compute) as (node, directory):
            presence = Presence(self._settings, self._prepared, node, directory)
            try:
                await self._serve(node, directory, presence, on_ready, on_network, on_move)
            finally:
                self._abandoned.set()  # what is being loaded

    async def _serve(
        self,
        node: Node,
        directory: Directory,
        presence: Presence,
        on_ready: Callable[[Announcement], None],
        on_network: Callable[[NetworkSpeed], None],
        on_move: Callable[[Announcement, Move], None],
    ) -> None:
        rebalancing = Rebalancing(node.peer_id, directory, presence, self._prepared, self._settings)
        if self._settings.blocks is not None:
            presence.bounds = self._settings.blocks
        else:
            await rebalancing.find_place()
        try:
            async with asyncio.TaskGroup() as tasks:
                watching = [
                    tasks.create_task(presence.keep_announced()),
                    tasks.create_task(node.fail_with_daemon()),
                    tasks.create_task(fail_with_compute(self._compute)),
                ]
                checkpoint = self._prepared.checkpoint
                self._own_experts = OwnExperts(self._prepared, directory)
                if self._prepared.routed:
                    self._experts = ExpertDispatch(
                        node,
                        directory,
                        checkpoint.model_digest,
                        checkpoint.hidden_size,
                        self._prepared.dtype,
                        self._compute.waited,
                    )
                    watching.append(tasks.create_task(self._experts.run()))
                    presence.experts = self._experts
                await self._load(presence, {})
                steps = StepRunner(self._compute, self._experts, self._settings.experts_deadline_s)
                dtype, idle_timeout_s = dtype_name(self._prepared.dtype), self._settings.idle_timeout_s
                streams = StreamServer(Host(node, steps, presence.table, checkpoint.hidden_size, dtype, idle_timeout_s))
                watching.append(
                    tasks.create_task(self._measure_network(node, directory, presence, streams, on_network))
                )

                async def carry_out(move: Move) -> bool:
                    if move.is_focus:
                        return await self._refocus(move, presence, on_move)
                    return await self._move(move, presence, streams, on_move)

                await self._open(node, presence, streams, on_ready)
                moving = tasks.create_task(rebalancing.run(carry_out)) if self._may_move() else None
                try:
                    await self._leave.wait()
                    if moving is not None:
                        self._abandoned.set()
                        moving.cancel()
                        await asyncio.wait([moving])
                    await self._hand_over(presence, streams)
                finally:
                    await presence.withdraw()
                for task in watching:
                    task.cancel()
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from group

    def _may_move(self) -> bool:
        settings = self._settings
        return settings.blocks is None and settings.rebalances and not self._prepared.plan.offloaded_blocks

    async def _load(self, presence: Presence, reuse: Mapping[int, nn.Module]) -> None:
        """Load the span that `presence` announces."""
        start, end = presence.bounds
        assert self._own_experts is not None
        presence.routed = routed = await self._own_experts.choose(presence.bounds, reuse)

        def load() -> HostedSpan:
            return load_hosted_span(
                self._prepared, self._settings, start, end, routed=routed, reuse=reuse, abandoned=self._abandoned
            )

        hosted, _ = await self._compute.run(load)
        logger.info("%d of %d blocks were in memory already", hosted.reused, end - start)
        for module in routed_experts(hosted.span.layers):
            module.elsewhere = self._experts
        presence.table = hosted.new_table(self._prepared, self._settings)
        presence.speed, presence.block_digests = hosted.speed, hosted.block_digests
        self._hosted = hosted

    async def _open(
        self, node: Node, presence: Presence, streams: StreamServer, on_ready: Callable[[Announcement], None]
    ) -> None:
        await node.serve(STREAM_PROTOCOL, streams.handle_session)
        await node.serve(LINK_PROTOCOL, streams.handle_link)
        await node.serve(MEASURE_PROTOCOL, MeasuringServer(streams.host.steps.is_busy).handle)
        presence.state = State.ONLINE
        announcement, _ = await presence.announce()
        on_ready(announcement)

    async def _refocus(self, move: Move, presence: Presence, on_move: Callable[[Announcement, Move], None]) -> bool:
        """Let new sessions come to another part of what is loaded."""
        logger.info("hosting %s", move.reason)
        presence.focus = move.new
        announcement, _ = await presence.announce()
        on_move(announcement, move)
        return True

    async def _move(
        self, move: Move, presence: Presence, streams: StreamServer, on_move: Callable[[Announcement, Move], None]
    ) -> bool:
        """Hand over the sessions, and host other blocks; False: they could not be loaded, and all is as before.

        Raises:
            SwarmError: what was hosted before cannot be loaded again, either.
        """
        logger.warning("moving from blocks %d to %d to %s", move.old[0], move.old[1] - 1, move.reason)
        await self._hand_over(presence, streams)
        await streams.hang_up()
        kept = await self._give_up_span(move.new, presence, streams)
        presence.state = State.JOINING
        moved = await self._try_to_load(move.new, kept, presence)
        if not moved:
            await self._compute.run(free_memory)
            try:
                await self._become(move.old, kept, presence)
            except _RELOAD_FAILURES as error:
                raise SwarmError(
                    f"Other blocks could not be loaded, nor those that were hosted before: {error}. This server "
                    "leaves; start it again when the cause is gone."
                ) from error
        streams.host.table = presence.table
        presence.moves += moved
        presence.state = State.ONLINE
        announcement, _ = await presence.announce()
        if moved:
            on_move(announcement, move)
        return moved

    async def _hand_over(self, presence: Presence, streams: StreamServer) -> None:
        """Have new sessions go elsewhere, then those that are here: both at once would slow their tokens down."""
        presence.state = State.DRAINING
        try:
            async with asyncio.timeout(_SAY_SO_WITHIN_S):
                await presence.announce()
        except (TimeoutError, SwarmError) as error:  # the sessions are to be handed over all the same
            logger.warning("could not announce that this server drains: %s", error or "the directory does not answer")
        await streams.drain(self._settings.drain_timeout_s)

    async def _give_up_span(
        self, new: tuple[int, int], presence: Presence, streams: StreamServer
    ) -> dict[int, nn.Module]:
        """Free what is hosted, but for the layers that `new` has as well, as far as there is room for them now."""
        assert self._hosted is not None
        span, plan = self._hosted.span, self._prepared.plan
        presence.table = streams.host.table = self._hosted = None
        presence.block_digests = ()
        room_bytes = plan.kv_bytes + plan.kept_bytes  # which are free now

        def take_out() -> dict[int, nn.Module]:
            nonlocal span
            kept = span.take_out(*new, room_bytes)
            del span
            return kept

        kept, _ = await self._compute.run(take_out)
        await self._compute.run(free_memory)
        return kept

    async def _try_to_load(self, bounds: tuple[int, int], kept: Mapping[int, nn.Module], presence: Presence) -> bool:
        old = presence.bounds
        try:
            await self._become(bounds, kept, presence)
        except _RELOAD_FAILURES as error:
            logger.error(
                "blocks %d to %d could not be loaded (%s); going back to blocks %d to %d",
                bounds[0], bounds[1] - 1, error, old[0], old[1] - 1,
            )  # fmt: skip
            return False
        return True

    async def _become(self, bounds: tuple[int, int], kept: Mapping[int, nn.Module], presence: Presence) -> None:
        presence.bounds = bounds
        await presence.announce()  # so that nobody else comes here meanwhile
        await self._load(presence, kept)

    async def _measure_network(
        self,
        node: Node,
        directory: Directory,
        presence: Presence,
        streams: StreamServer,
        on_network: Callable[[NetworkSpeed], None],
    ) -> None:
        def changed(speed: NetworkSpeed) -> None:
            presence.network = speed
            presence.renew_soon()
            on_network(speed)

        def is_busy() -> bool:
            return presence.state is not State.ONLINE or streams.host.steps.is_busy()

        model = self._prepared.checkpoint.model_digest
        measurement = NetworkMeasurement(
            node, lambda: presence.focus, lambda: directory.servers(model), is_busy, changed
        )  # fmt: skip
        await measurement.run()
