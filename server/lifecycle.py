"""A server's life: plan, join, load, serve, drain, leave."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from tqdm import tqdm

from swarm import __version__
from swarm.dht import RENEWAL_S, Announcement, Directory, State, precision_name
from swarm.errors import PeerError, SwarmError
from swarm.models import Checkpoint, Span, load_span, open_checkpoint
from swarm.models.kv_size import kv_bytes_per_position
from swarm.models.offload import WINDOW_BLOCKS
from swarm.models.paged_cache import PagePool
from swarm.models.pages import pages_for
from swarm.models.quantization import SCHEMES, SCHEMES_FOR_FILES, SCHEMES_ON, bytes_per_weight
from swarm.models.together import Together, prepare_span
from swarm.placement import Capacity, Hosting, choose_span
from swarm.protocol.messages import LINK_PROTOCOL, STREAM_PROTOCOL
from swarm.protocol.tensors import dtype_name
from swarm.server.compute import ComputeThread
from swarm.server.machine import allowed_memory, choose_device, device_name, usable_cores
from swarm.server.neighbours import NetworkSpeed
from swarm.server.network_speed import NetworkMeasurement
from swarm.server.plan import MemoryPlan, make_plan
from swarm.server.resident_memory import give_memory_back, memory_given_back, share_one_heap
from swarm.server.sessions import SessionTable
from swarm.server.settings import ServerSettings
from swarm.server.streams import StreamServer
from swarm.server.throughput import ComputeSpeed, measure_compute
from swarm.server.throughput_cache import MeasuredOn, remember_speed, remembered_speed
from swarm.transport.identity import Identity
from swarm.transport.measuring import MEASURE_PROTOCOL, MeasuringServer
from swarm.transport.node import Node

logger = logging.getLogger(__name__)

_DIGEST_DIGITS = 16
_KEPT_COPIES = 2
"""Of every position's activations: in the session's history, and beside a page that is remembered."""


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
        _check_quantization(settings.quantization, checkpoint, device, offload=settings.offload)
    plan = make_plan(
        [_block_bytes(checkpoint, block, settings.quantization, dtype) for block in range(checkpoint.num_blocks)],
        kv_bytes_per_position(checkpoint.config, dtype),
        memory_bytes,
        memory_from,
        blocks=settings.blocks,
        num_blocks=settings.num_blocks,
        kv_tokens=settings.kv_tokens,
        kept_bytes_per_position=_KEPT_COPIES * checkpoint.hidden_size * dtype.itemsize if device.type == "cpu" else 0,
        window_blocks=WINDOW_BLOCKS if settings.offload else 0,
    )
    return Prepared(checkpoint, device, dtype, plan)


def _check_quantization(scheme: str, checkpoint: Checkpoint, device: torch.device, *, offload: bool) -> None:
    if scheme not in SCHEMES:
        raise ValueError(f"--quantize {scheme} is none of {', '.join(SCHEMES)}")
    here = SCHEMES_ON.get(device.type, ())
    if scheme not in here:
        instead = f"on {device} there is {' and '.join(here)}" if here else f"leave it out on {device}"
        raise ValueError(f"--quantize {scheme} is not for this device: {instead}")
    if offload and scheme not in SCHEMES_FOR_FILES:
        raise ValueError(f"--quantize {scheme} and --offload do not go together; {SCHEMES_FOR_FILES[0]} and it do")
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
        self._compute_speed: ComputeSpeed | None = None
        self._network_speed = NetworkSpeed()
        self._together: Together | None = None
        self._span_bounds = (0, 0)
        self._block_digests: tuple[str, ...] = ()

    def leave(self) -> None:
        """Begin to drain; :meth:`run` returns when that is done."""
        self._leave.set()

    async def run(
        self,
        on_ready: Callable[[Announcement], None] = lambda _: None,
        on_network: Callable[[NetworkSpeed], None] = lambda _: None,
    ) -> None:
        """Join the swarm, load, serve until :meth:`leave`, drain and leave.

        Args:
            on_ready: called with the first announcement in which the server is online.
            on_network: called whenever the ways to other servers have been measured.

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
                await self._serve(node, directory, prepared.checkpoint, on_ready, on_network)
            finally:
                await directory.leave()
        finally:
            self._compute.stop()
            await node.stop()

    async def _serve(
        self,
        node: Node,
        directory: Directory,
        checkpoint: Checkpoint,
        on_ready: Callable[[Announcement], None],
        on_network: Callable[[NetworkSpeed], None],
    ) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                watching = [
                    tasks.create_task(self._keep_announced(node, directory)),
                    tasks.create_task(_fail_with_daemon(node)),
                ]
                streams = await self._load(node, checkpoint)
                watching.append(tasks.create_task(self._measure_network(node, directory, streams, on_network)))
                await self._serve_until_leave(node, directory, streams, on_ready)
                for task in watching:
                    task.cancel()
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from group

    async def _load(self, node: Node, checkpoint: Checkpoint) -> StreamServer:
        span, pool = await self._load_span(checkpoint)
        self._table = SessionTable(
            span,
            checkpoint.model_digest,
            pool,
            self._settings.max_sessions,
            together=self._together,
            reuses=self._settings.reuses_prompts,
        )
        return StreamServer(
            node, self._table, self._compute, checkpoint.hidden_size, span.dtype, self._settings.idle_timeout_s
        )

    async def _serve_until_leave(
        self, node: Node, directory: Directory, streams: StreamServer, on_ready: Callable[[Announcement], None]
    ) -> None:
        await node.serve(STREAM_PROTOCOL, streams.handle_session)
        await node.serve(LINK_PROTOCOL, streams.handle_link)
        await node.serve(MEASURE_PROTOCOL, MeasuringServer(streams.is_busy).handle)
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

    async def _measure_network(
        self, node: Node, directory: Directory, streams: StreamServer, on_network: Callable[[NetworkSpeed], None]
    ) -> None:
        def changed(speed: NetworkSpeed) -> None:
            self._network_speed = speed
            self._renew.set()
            on_network(speed)

        def is_busy() -> bool:
            return self._state is not State.ONLINE or streams.is_busy()

        model = self._prepared.checkpoint.model_digest
        await NetworkMeasurement(node, self._span_bounds, lambda: directory.servers(model), is_busy, changed).run()

    async def _choose_blocks(self, directory: Directory) -> tuple[int, int]:
        if self._settings.blocks is not None:
            return self._settings.blocks
        checkpoint = self._prepared.checkpoint
        others = await directory.servers(checkpoint.model_digest)
        hosted = [
            Hosting(one.peer_id, one.start, one.end, one.throughput, one.state is State.DRAINING) for one in others
        ]
        fits = self._prepared.plan.num_blocks
        return choose_span(hosted, checkpoint.num_blocks, Capacity(fits), blocks=fits)

    async def _load_span(self, checkpoint: Checkpoint) -> tuple[Span, PagePool]:
        start, end = self._span_bounds
        total = sum(checkpoint.block_elements(block) for block in range(start, end))

        def load() -> tuple[Span, PagePool, tuple[str, ...]]:
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
                self._together = prepare_span(span, checkpoint.hidden_size)
                pool = PagePool.for_span(span, checkpoint.hidden_size, pages_for(self._prepared.plan.kv_tokens))
            if self._together is None:
                logger.warning(
                    "%s models compute attention in a way of their own: sessions run one by one, not as a batch",
                    checkpoint.config.model_type,
                )
            self._compute_speed = self._speed_of(span, checkpoint)
            return span, pool, digests

        (span, pool, digests), _ = await self._compute.run(load)
        self._block_digests = tuple(digest[:_DIGEST_DIGITS] for digest in digests[start:end])
        return span, pool

    def _speed_of(self, span: Span, checkpoint: Checkpoint) -> ComputeSpeed:
        """As it was measured on an earlier start, or is measured now. Runs on the device."""
        measured_on = MeasuredOn(
            device=device_name(span.device),
            threads=torch.get_num_threads(),
            cores=usable_cores(),
            model=checkpoint.model_digest,
            start=span.start,
            end=span.end,
            precision=precision_name(dtype_name(span.dtype), self._settings.quantization or ""),
            software=(__version__, str(torch.__version__), transformers.__version__),
        )
        if not self._settings.measure_again and (known := remembered_speed(measured_on, time.time())) is not None:
            logger.info("the speed of this machine is known from an earlier start")
            return known
        speed = measure_compute(span, checkpoint.hidden_size, self._together)
        remember_speed(measured_on, speed, time.time())
        give_memory_back()
        return speed

    async def _announcement(self, node: Node) -> Announcement:
        checkpoint, (start, end) = self._prepared.checkpoint, self._span_bounds
        decode = dict(self._compute_speed.decode_steps_per_s) if self._compute_speed else {}
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
            throughput=decode.get(1, 0.0),
            decode_steps_per_s=decode,
            prefill_tokens_per_s=self._compute_speed.prefill_tokens_per_s if self._compute_speed else None,
            rtts_s=dict(self._network_speed.rtts_s),
            upload_bytes_per_s=self._network_speed.upload_bytes_per_s,
            download_bytes_per_s=self._network_speed.download_bytes_per_s,
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
