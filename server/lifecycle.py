"""A server's life: plan, join, load, serve, drain, leave."""

from __future__ import annotations

import asyncio
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tqdm import tqdm

from swarm import __version__
from swarm.dht import RENEWAL_S, Announcement, Directory, State
from swarm.errors import PeerError, SwarmError
from swarm.models import Checkpoint, Span, load_span, open_checkpoint
from swarm.models.kv_size import kv_bytes_per_position
from swarm.models.offload import WINDOW_BLOCKS
from swarm.models.quantization import SCHEMES, bytes_per_weight
from swarm.models.together import Together, way_together
from swarm.models.weight_layout import lay_out_span
from swarm.placement import choose_span
from swarm.protocol.messages import LINK_PROTOCOL, STREAM_PROTOCOL
from swarm.protocol.tensors import dtype_name
from swarm.server.compute import ComputeThread
from swarm.server.machine import allowed_memory, choose_device
from swarm.server.plan import MemoryPlan, make_plan
from swarm.server.resident_memory import memory_given_back, share_one_heap
from swarm.server.sessions import SessionTable
from swarm.server.settings import ServerSettings
from swarm.server.streams import StreamServer
from swarm.transport.identity import Identity
from swarm.transport.node import Node

logger = logging.getLogger(__name__)

_DIGEST_DIGITS = 16
_WARM_UP_STEPS = 5


@dataclass(frozen=True)
class Prepared:
    """What a server knows before it joins: checkpoint, device, precision, plan."""

    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    plan: MemoryPlan


def prepare(settings: ServerSettings) -> Prepared:
    """Open the checkpoint and plan the memory; nothing is loaded and nobody is contacted.

    Raises:
        ModelError, InsufficientMemory: as they say.
        ValueError: the settings contradict the model or the machine.
    """
    checkpoint = open_checkpoint(
        settings.model, revision=settings.revision, allow_untested=settings.allow_untested_family
    )
    if settings.blocks is not None and not 0 <= settings.blocks[0] < settings.blocks[1] <= checkpoint.num_blocks:
        start, end = settings.blocks
        raise ValueError(
            f"{settings.model} has blocks 0 to {checkpoint.num_blocks - 1}, so --blocks {start}:{end} is not a span "
            f"of it (the whole model is 0:{checkpoint.num_blocks})"
        )
    if settings.num_blocks is not None and not 1 <= settings.num_blocks <= checkpoint.num_blocks:
        raise ValueError(f"--num-blocks must be between 1 and {checkpoint.num_blocks}, the blocks of {settings.model}")
    device = choose_device(settings.device)
    dtype = settings.dtype or checkpoint.default_dtype
    memory_bytes, memory_from = allowed_memory(device, settings.memory_bytes)
    if settings.quantization is not None:
        _check_quantization(settings.quantization, checkpoint, device)
    plan = make_plan(
        [_block_bytes(checkpoint, block, settings.quantization, dtype) for block in range(checkpoint.num_blocks)],
        kv_bytes_per_position(checkpoint.config, dtype),
        memory_bytes,
        memory_from,
        blocks=settings.blocks,
        num_blocks=settings.num_blocks,
        kv_tokens=settings.kv_tokens,
        kept_bytes_per_position=checkpoint.hidden_size * dtype.itemsize if device.type == "cpu" else 0,
        window_blocks=WINDOW_BLOCKS if settings.offload else 0,
    )
    return Prepared(checkpoint, device, dtype, plan)


def _check_quantization(scheme: str, checkpoint: Checkpoint, device: torch.device) -> None:
    if scheme not in SCHEMES:
        raise ValueError(f"--quantize {scheme} is none of {', '.join(SCHEMES)}")
    if device.type != "cpu":
        raise ValueError(f"--quantize {scheme} is for CPUs as yet; leave it out on {device}")
    if any("expert" in name for block in range(checkpoint.num_blocks) for name in checkpoint.tensor_names(block)):
        raise ValueError(f"{checkpoint.name} has experts, which cannot be quantized yet; leave --quantize out")


def _block_bytes(checkpoint: Checkpoint, block: int, quantization: str | None, dtype: torch.dtype) -> int:
    """What a block's weights occupy once they are loaded."""
    entries = [checkpoint.files.entries[name] for name in checkpoint.tensor_names(block)]
    each = [
        bytes_per_weight(quantization if len(entry.shape) == 2 else None, dtype) * entry.elements for entry in entries
    ]
    return int(sum(each))


class Server:
    """One server. :meth:`run` does everything, from joining to leaving."""

    def __init__(self, settings: ServerSettings, prepared: Prepared) -> None:
        self._settings, self._prepared = settings, prepared
        share_one_heap()
        self._compute = ComputeThread(settings.threads)
        self._leave = asyncio.Event()
        self._renew = asyncio.Event()
        self._state = State.JOINING
        self._table: SessionTable | None = None
        self._throughput = 0.0
        self._together: Together | None = None
        self._span_bounds = (0, 0)
        self._block_digests: tuple[str, ...] = ()

    def leave(self) -> None:
        """Begin to drain; :meth:`run` returns when that is done."""
        self._leave.set()

    async def run(self, on_ready: Callable[[Announcement], None] = lambda _: None) -> None:
        """Join the swarm, load, serve until :meth:`leave`, drain and leave.

        Args:
            on_ready: called with the first announcement in which the server is online.

        Raises:
            BootstrapFailed, PortTaken, PeerError: the swarm cannot be joined.
            CorruptCheckpoint: the weights cannot be loaded.
        """
        settings, prepared = self._settings, self._prepared
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
                self._span_bounds = await self._choose_blocks(directory)
                await self._serve(node, directory, prepared.checkpoint, on_ready)
            finally:
                await directory.leave()
        finally:
            self._compute.stop()
            await node.stop()

    async def _serve(
        self, node: Node, directory: Directory, checkpoint: Checkpoint, on_ready: Callable[[Announcement], None]
    ) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                watching = [
                    tasks.create_task(self._keep_announced(node, directory)),
                    tasks.create_task(_fail_with_daemon(node)),
                ]
                await self._load_and_serve(node, directory, checkpoint, on_ready)
                for task in watching:
                    task.cancel()
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from group

    async def _load_and_serve(
        self, node: Node, directory: Directory, checkpoint: Checkpoint, on_ready: Callable[[Announcement], None]
    ) -> None:
        span = await self._load(checkpoint)
        plan = self._prepared.plan
        self._table = SessionTable(
            span,
            checkpoint.model_digest,
            plan.kv_tokens,
            self._settings.max_sessions,
            plan.kept_blocks,
            together=self._together,
        )
        streams = StreamServer(
            node, self._table, self._compute, checkpoint.hidden_size, span.dtype, self._settings.idle_timeout_s
        )
        await node.serve(STREAM_PROTOCOL, streams.handle_session)
        await node.serve(LINK_PROTOCOL, streams.handle_link)
        self._state = State.ONLINE
        announcement = await self._announcement(node)
        await directory.announce(announcement)
        on_ready(announcement)
        try:
            await self._leave.wait()
            self._state = State.DRAINING
            self._renew.set()
            await streams.drain(self._settings.drain_timeout_s)
        finally:
            await directory.withdraw(await self._announcement(node))

    async def _choose_blocks(self, directory: Directory) -> tuple[int, int]:
        if self._settings.blocks is not None:
            return self._settings.blocks
        checkpoint = self._prepared.checkpoint
        others = await directory.servers(checkpoint.model_digest)
        hosted = [(one.start, one.end) for one in others if one.state is not State.DRAINING]
        return choose_span(hosted, checkpoint.num_blocks, self._prepared.plan.num_blocks)

    async def _load(self, checkpoint: Checkpoint) -> Span:
        start, end = self._span_bounds
        total = sum(checkpoint.block_elements(block) for block in range(start, end))

        def load() -> tuple[Span, tuple[str, ...]]:
            with memory_given_back():
                with tqdm(
                    total=total, unit=" weights", unit_scale=True, desc=f"Loading blocks {start} to {end - 1}"
                ) as bar:
                    span = load_span(
                        checkpoint,
                        start,
                        end,
                        dtype=self._prepared.dtype,
                        device=self._prepared.device,
                        quantization=self._settings.quantization,
                        offloaded_blocks=self._prepared.plan.offloaded_blocks,
                        on_elements=bar.update,
                    )
                digests = checkpoint.digests.blocks if checkpoint.files.paths else ()
                checkpoint.files.release()
                lay_out_span(span, checkpoint.hidden_size)
                self._together = way_together(span, checkpoint.hidden_size)
            if self._together is None:
                logger.warning(
                    "%s models compute attention in a way of their own: sessions run one by one, not as a batch",
                    checkpoint.config.model_type,
                )
            self._throughput = _measure_throughput(span, checkpoint.hidden_size)
            return span, digests

        (span, digests), _ = await self._compute.run(load)
        self._block_digests = tuple(digest[:_DIGEST_DIGITS] for digest in digests[start:end])
        return span

    async def _announcement(self, node: Node) -> Announcement:
        checkpoint, (start, end) = self._prepared.checkpoint, self._span_bounds
        return Announcement(
            peer_id=node.peer_id,
            model=checkpoint.model_digest,
            model_name=self._settings.model[-96:],
            state=self._state,
            num_blocks=checkpoint.num_blocks,
            start=start,
            end=end,
            block_digests=self._block_digests,
            dtype=dtype_name(self._prepared.dtype),
            quantization=self._settings.quantization or "",
            throughput=self._throughput,
            free_kv_tokens=self._table.free_tokens if self._table else self._prepared.plan.kv_tokens,
            sessions=len(self._table) if self._table else 0,
            addresses=tuple((await node.addresses())[:8]),
            version=__version__,
            public_name=self._settings.public_name,
            issued_at=time.time(),
        )

    async def _keep_announced(self, node: Node, directory: Directory) -> None:
        """Renew the announcement for ever; find the way back into the swarm if it is lost."""
        while True:
            self._renew.clear()
            try:
                stored = await directory.announce(await self._announcement(node))
                if self._settings.initial_peers and directory.is_alone():
                    logger.warning("no other peer is in sight; trying the initial peers again")
                    await directory.rejoin(self._settings.initial_peers)
                elif not stored:
                    logger.warning("the announcement was not stored; trying again in %.0f s", RENEWAL_S)
            except SwarmError as error:
                logger.warning("could not announce: %s", error)
            try:
                async with asyncio.timeout(RENEWAL_S):
                    await self._renew.wait()
            except TimeoutError:
                pass


async def _fail_with_daemon(node: Node) -> None:
    """Raise as soon as p2pd has died: without it nobody can reach this server."""
    await node.wait_for_daemon()
    raise PeerError("p2pd, the network daemon of this server, has died; start the server again")


def _measure_throughput(span: Span, hidden_size: int) -> float:
    """Decode steps per second through the whole span for one sequence. Runs on the device.

    The best of a few; if blocks are read from disk, all but the first on average: each leaves the next one waiting.
    """
    cache, times = span.new_cache(), []
    hidden_states = torch.zeros(1, 1, hidden_size, dtype=span.dtype, device=span.device)
    for _ in range(_WARM_UP_STEPS):
        begun = time.perf_counter()
        span.forward(hidden_states, cache).to("cpu")
        times.append(time.perf_counter() - begun)
    return 1 / (statistics.mean(times[1:]) if span.offloaded else min(times))
