"""The life of a server of experts: join, load, compute for others, take over what nobody hosts, drain, leave."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Mapping

import torch
from tqdm import tqdm

from swarm import __version__
from swarm.dht import Directory, ExpertAnnouncement, State
from swarm.dht.expert_announcement import bitmaps_of
from swarm.errors import SwarmError
from swarm.models.experts import HostedExperts, load_experts
from swarm.placement.expert_coverage import ExpertHost
from swarm.placement.expert_demand import NO_DEMAND, ExpertDemand
from swarm.placement.experts import ExpertJoiner, share_experts
from swarm.protocol.messages import EXPERTS_PROTOCOL
from swarm.protocol.tensors import dtype_name
from swarm.server.announcer import Announcer
from swarm.server.compute import ComputeThread
from swarm.server.experts.preparation import PreparedExperts
from swarm.server.experts.repair import Repair
from swarm.server.experts.streams import Contribution, ExpertStreams
from swarm.server.membership import fail_with_compute, membership
from swarm.server.resident_memory import free_memory, memory_given_back, share_one_heap
from swarm.server.settings import ServerSettings
from swarm.server.throughput import best_s
from swarm.transport.node import Node

logger = logging.getLogger(__name__)

_LEAVING_S = 1.0
"""So long before it goes, those who use it learn that it will."""
_HAND_OVER_S = 6.0
"""So long before it gives experts up, those who use it learn that it will, and ask others for them."""
_LOAD_FAILURES = (SwarmError, OSError, MemoryError, RuntimeError)
"""torch reports that memory is exhausted as a RuntimeError."""
_MEASURED_ROWS = 64
_MEASURING_S = 0.3


class ExpertServer:
    """One server of experts. :meth:`run` does everything, from joining to leaving."""

    def __init__(self, settings: ServerSettings, prepared: PreparedExperts) -> None:
        self._settings, self._prepared = settings, prepared
        share_one_heap()
        self._compute = ComputeThread(settings.threads)
        self._leave = asyncio.Event()
        self._state = State.JOINING
        self._hosted: dict[int, frozenset[int]] = {}
        self._coming: dict[int, frozenset[int]] = {}
        self._streams: ExpertStreams | None = None
        self._rows_per_s: float | None = None
        self._tentative = False

    @property
    def contribution(self) -> Contribution:
        """What it has done for others."""
        return self._streams.contribution if self._streams is not None else Contribution()

    def leave(self) -> None:
        """Begin to drain; :meth:`run` returns when that is done."""
        self._leave.set()

    async def run(
        self,
        on_plan: Callable[[Mapping[int, frozenset[int]]], None] = lambda _: None,
        on_ready: Callable[[ExpertAnnouncement], None] = lambda _: None,
        on_repair: Callable[[ExpertAnnouncement], None] = lambda _: None,
    ) -> None:
        """Join the swarm, load, serve until :meth:`leave`, and leave.

        Args:
            on_plan: called with the experts to be hosted, by block, before they are loaded.
            on_ready: called with the first announcement in which the server is online.
            on_repair: called when it hosts experts that nobody hosted, with the announcement that says so.

        Raises:
            BootstrapFailed, PortTaken, PeerError: the swarm cannot be joined.
            CorruptCheckpoint: the weights cannot be loaded.
        """
        async with membership(self._settings, self._compute) as (node, directory):
            await self._serve(node, directory, on_plan, on_ready, on_repair)

    async def _serve(
        self,
        node: Node,
        directory: Directory,
        on_plan: Callable[[Mapping[int, frozenset[int]]], None],
        on_ready: Callable[[ExpertAnnouncement], None],
        on_repair: Callable[[ExpertAnnouncement], None],
    ) -> None:
        prepared = self._prepared
        await self._compute.run(lambda: prepared.checkpoint.model_digest)  # reads files, which loading lets go of
        announcer = Announcer(
            node,
            directory,
            self._settings.initial_peers,
            lambda addresses: self._announcement(node, addresses),
            prepared.checkpoint.num_blocks,
            {block: table.count for block, table in prepared.tables.items()},
        )
        if prepared.wanted is not None:
            self._hosted = dict(prepared.wanted)
        else:
            await self._find_place(node, directory, announcer)
        on_plan(self._hosted)
        try:
            async with asyncio.TaskGroup() as tasks:
                watching = [
                    tasks.create_task(announcer.keep_announced()),
                    tasks.create_task(node.fail_with_daemon()),
                    tasks.create_task(fail_with_compute(self._compute)),
                ]
                loaded, _ = await self._compute.run(self._load_all)
                checkpoint = prepared.checkpoint
                self._streams = streams = ExpertStreams(
                    loaded, checkpoint.model_digest, checkpoint.hidden_size, prepared.dtype, self._compute
                )
                await node.serve(EXPERTS_PROTOCOL, streams.handle)
                try:
                    self._state = State.ONLINE
                    announcement, _ = await announcer.announce()
                    on_ready(announcement)
                    repairing = tasks.create_task(self._repair(node, directory, announcer, streams, on_repair))
                    await self._leave.wait()
                    repairing.cancel()
                    await asyncio.wait([repairing])
                    self._state, streams.draining = State.DRAINING, True
                    await announcer.announce()
                    await asyncio.sleep(_LEAVING_S)
                finally:
                    self._state = State.OFFLINE
                    await announcer.announce()
                for task in watching:
                    task.cancel()
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from group

    def _load_all(self) -> dict[int, HostedExperts]:
        """Called on the compute thread."""
        loaded = self._load(self._hosted)
        self._rows_per_s = _measure(next(iter(loaded.values())), self._prepared)
        return loaded

    def _load(self, wanted: Mapping[int, frozenset[int]]) -> dict[int, HostedExperts]:
        """Called on the compute thread."""
        prepared = self._prepared
        total = sum(
            prepared.tables[block].elements_of_one(prepared.checkpoint) * len(experts)
            for block, experts in wanted.items()
        )
        with (
            memory_given_back(),
            tqdm(total=total, unit=" weights", unit_scale=True, desc="Loading experts") as bar,
        ):
            return load_experts(
                prepared.checkpoint,
                prepared.tables,
                wanted,
                dtype=prepared.dtype,
                device=prepared.device,
                on_elements=bar.update,
            )

    async def _repair(
        self,
        node: Node,
        directory: Directory,
        announcer: Announcer[ExpertAnnouncement],
        streams: ExpertStreams,
        on_repair: Callable[[ExpertAnnouncement], None],
    ) -> None:
        """Host what nobody hosts, whenever there is such a thing, unless the owner has said what to host."""
        if self._prepared.wanted is not None or not self._settings.rebalances:
            return

        async def claim(coming: Mapping[int, frozenset[int]]) -> None:
            self._coming = dict(coming)
            await announcer.announce()

        async def carry_out(wanted: Mapping[int, frozenset[int]]) -> bool:
            repaired = await self._host_instead(wanted, announcer, streams)
            announcement, _ = await announcer.announce()
            if repaired:
                on_repair(announcement)
            return repaired

        await Repair(node.peer_id, directory, self._prepared, self._settings).run(
            lambda: self._hosted, claim, carry_out
        )

    async def _host_instead(
        self, wanted: Mapping[int, frozenset[int]], announcer: Announcer[ExpertAnnouncement], streams: ExpertStreams
    ) -> bool:
        """Give up the blocks of which other experts are wanted, and load these, block by block.

        Returns:
            Whether all could be loaded. If not, it hosts what it could load.
        """
        changed = {
            block for block in wanted.keys() | self._hosted.keys() if wanted.get(block) != self._hosted.get(block)
        }
        logger.warning("hosting experts of %d blocks that nobody hosts", len(changed & wanted.keys()))
        given_up = changed & self._hosted.keys()
        self._hosted = {block: experts for block, experts in self._hosted.items() if block not in changed}
        self._coming = dict(wanted)
        await announcer.announce()
        await asyncio.sleep(_HAND_OVER_S)
        for block in given_up:
            streams.host(block, None)
        await self._compute.run(free_memory)
        try:
            for block in sorted(changed & wanted.keys()):
                loaded, _ = await self._compute.run(functools.partial(self._load, {block: wanted[block]}))
                streams.host(block, loaded[block])
                self._hosted = {**self._hosted, block: wanted[block]}
                await announcer.announce()
        except _LOAD_FAILURES as error:
            logger.error("experts that nobody hosts could not be loaded: %s", error)
            if not self._hosted:
                raise
            return False
        finally:
            self._coming = {}
        return True

    async def _find_place(self, node: Node, directory: Directory, announcer: Announcer[ExpertAnnouncement]) -> None:
        """Choose what is needed most; with others who come at the same time, share it."""
        prepared, model = self._prepared, self._prepared.checkpoint.model_digest
        shape, sizes = prepared.model_shape, prepared.expert_sizes
        me = ExpertJoiner(node.peer_id, prepared.room_bytes)

        async def choose() -> dict[int, frozenset[int]]:
            others = [one for one in await directory.experts(model) if one.peer_id != node.peer_id]
            joiners = [ExpertJoiner(one.peer_id, one.room_bytes) for one in others if one.tentative]
            hosts = [
                ExpertHost(one.peer_id, one.experts_soon, one.rows_per_s or 0.0)
                for one in others
                if not one.tentative and one.state is not State.DRAINING
            ]
            # Those who join at once must all compute the same, and what they are told differs by moments.
            told = ExpertDemand.told((one.tokens_lately for one in others), dict(enumerate(shape)))
            demand = NO_DEMAND if joiners else told
            shared = await asyncio.to_thread(share_experts, [me, *joiners], hosts, shape, sizes, demand)
            return {block: experts for block, experts in shared[node.peer_id].items() if experts}

        self._tentative = True
        self._hosted = await choose()
        await announcer.announce()
        await asyncio.sleep(self._settings.settle_wait_s)
        self._hosted = await choose()
        self._tentative = False

    def _announcement(self, node: Node, addresses: tuple[str, ...]) -> ExpertAnnouncement:
        checkpoint = self._prepared.checkpoint
        return ExpertAnnouncement(
            peer_id=node.peer_id,
            model=checkpoint.model_digest,
            model_name=self._settings.model[-96:],
            # While there is nothing that it could compute, it is as if it joined anew.
            state=self._state if self._hosted or self._state is not State.ONLINE else State.JOINING,
            bitmaps=bitmaps_of(self._hosted or self._coming),
            coming=bitmaps_of(self._coming if self._hosted else {}),
            dtype=dtype_name(self._prepared.dtype),
            tentative=self._tentative,
            room_bytes=max(0, self._prepared.room_bytes),
            rows_per_s=self._rows_per_s,
            calls_under_way=self._streams.calls_under_way if self._streams else 0,
            heats=self._heats(),
            addresses=addresses,
            version=__version__,
            public_name=self._settings.public_name,
            issued_at=time.time(),
        )

    def _heats(self) -> dict[int, bytes]:
        heats = self._streams.asked.heats(time.monotonic()) if self._streams is not None else {}
        return {block: heat for block, heat in heats.items() if block in self._hosted}


def _measure(hosted: HostedExperts, prepared: PreparedExperts) -> float:
    """How many tokens an expert computes in a second, on average over those of one block. On the compute thread."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(_MEASURED_ROWS, prepared.checkpoint.hidden_size, generator=generator)
    states = states.to(prepared.device, prepared.dtype)
    experts = torch.tensor([hosted.kept[row % len(hosted.kept)] for row in range(_MEASURED_ROWS)])
    experts = experts.to(prepared.device)
    return _MEASURED_ROWS / best_s(lambda: hosted.compute(states, experts).to("cpu"), _MEASURING_S)
