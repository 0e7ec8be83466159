"""What a loaded span consists of on a server: weights, KV cache, a way to run sessions together, speed, digests."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import transformers
from torch import nn
from tqdm import tqdm

from swarm import __version__
from swarm.dht import precision_name
from swarm.models import Checkpoint, Span, load_span
from swarm.models.experts import RoutedTables
from swarm.models.native.library import library
from swarm.models.paged_cache import PagePool
from swarm.models.pages import pages_for
from swarm.models.together import Together, prepare_span
from swarm.protocol.tensors import dtype_name
from swarm.server.machine import device_name, usable_cores
from swarm.server.preparation import Prepared
from swarm.server.resident_memory import give_memory_back, memory_given_back
from swarm.server.sessions import SessionTable
from swarm.server.settings import ServerSettings
from swarm.server.throughput import ComputeSpeed, measure_compute
from swarm.server.throughput_cache import MeasuredOn, measuring, remember_speed, remembered_speed

logger = logging.getLogger(__name__)

_DIGEST_DIGITS = 16


class LoadAbandoned(Exception):
    """Nobody waits for the span any more: the server leaves."""


@dataclass(frozen=True)
class HostedSpan:
    """Blocks that are served, or could be at once. Made by :func:`load_hosted_span`."""

    span: Span
    pool: PagePool
    together: Together | None
    speed: ComputeSpeed
    block_digests: tuple[str, ...]
    """As they are announced."""
    reused: int = 0
    """So many of the blocks were in memory already."""

    def new_table(self, prepared: Prepared, settings: ServerSettings) -> SessionTable:
        """For the sessions on it."""
        return SessionTable(
            self.span,
            prepared.checkpoint.model_digest,
            self.pool,
            settings.max_sessions,
            together=self.together,
            reuses=settings.reuses_prompts,
        )


def load_hosted_span(
    prepared: Prepared,
    settings: ServerSettings,
    start: int,
    end: int,
    *,
    routed: RoutedTables,
    reuse: Mapping[int, nn.Module],
    abandoned: threading.Event,
) -> HostedSpan:
    """Load blocks ``[start, end)`` and all that belongs to them. Called on the compute thread only.

    Args:
        routed: of these blocks, those whose routed experts are not all to be here, and those of them that are.
        reuse: layers that are in memory already; see :func:`swarm.models.load_span`.
        abandoned: when it is set, loading ends soon.

    Raises:
        CorruptCheckpoint, DiskError, UnsupportedFamily: as `load_span`.
        LoadAbandoned: as asked.
    """
    checkpoint = prepared.checkpoint
    read = [block for block in range(start, end) if block not in reuse]
    elsewhere = {
        block: table.elements_of_one(checkpoint) * (table.count - len(kept)) for block, (table, kept) in routed.items()
    }
    total = sum(checkpoint.block_elements(block) - elsewhere.get(block, 0) for block in read)

    def go_on(elements: int = 0) -> None:
        if abandoned.is_set():
            raise LoadAbandoned
        bar.update(elements)

    with (
        memory_given_back(),
        tqdm(total=total, unit=" weights", unit_scale=True, desc=f"Loading blocks {start} to {end - 1}") as bar,
    ):
        span = load_span(
            checkpoint,
            start,
            end,
            dtype=prepared.dtype,
            device=prepared.device,
            quantization=settings.quantization,
            offloaded_blocks=prepared.plan.offloaded_blocks,
            reuse=reuse,
            routed=routed,
            on_elements=go_on,
        )
        digests = checkpoint.digests.blocks if checkpoint.files.paths else ()
        checkpoint.files.release()
        go_on()
        bar.set_description(f"Preparing blocks {start} to {end - 1}")  # compiles something, the first time
        together = prepare_span(span, checkpoint.hidden_size)
        pool = PagePool.for_span(span, checkpoint.hidden_size, pages_for(prepared.plan.kv_tokens))
    if together is None:
        logger.warning(
            "%s models compute attention in a way of their own: sessions run one by one, not as a batch",
            checkpoint.config.model_type,
        )
    if span.device.type == "cpu" and library() is None:
        logger.warning(
            "nothing is compiled for this machine, which computes more slowly than it could: install gcc or clang, or "
            "pip install 'swarm[compiler]'"
        )
    go_on()
    speed = _speed_of(span, together, checkpoint, settings)
    short = tuple(digest[:_DIGEST_DIGITS] for digest in digests[start:end])
    return HostedSpan(span, pool, together, speed, short, sum(start <= block < end for block in reuse))


def _speed_of(span: Span, together: Together | None, checkpoint: Checkpoint, settings: ServerSettings) -> ComputeSpeed:
    """As it was measured on an earlier start, or is measured now."""
    measured_on = MeasuredOn(
        device=device_name(span.device),
        threads=torch.get_num_threads(),
        cores=usable_cores(),
        model=checkpoint.model_digest,
        start=span.start,
        end=span.end,
        precision=precision_name(dtype_name(span.dtype), settings.quantization or ""),
        software=(__version__, str(torch.__version__), transformers.__version__),
    )
    if not settings.measure_again and (known := remembered_speed(measured_on, time.time())) is not None:
        logger.info("the speed of this machine is known from an earlier start")
        return known
    with measuring():
        speed = measure_compute(span, checkpoint.hidden_size, together)
    remember_speed(measured_on, speed, time.time())
    give_memory_back()
    return speed
