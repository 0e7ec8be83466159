"""What a server knows before it joins: checkpoint, device, precision, and a plan of its memory."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from swarm.models import Checkpoint, open_checkpoint
from swarm.models.experts import RoutedTables, find_expert_tensors
from swarm.models.kv_size import kv_bytes_per_position
from swarm.models.offload import WINDOW_BLOCKS
from swarm.models.quantization import SCHEMES, SCHEMES_FOR_FILES, SCHEMES_ON, bytes_per_weight
from swarm.server.machine import allowed_memory, choose_device
from swarm.server.plan import MemoryPlan, make_plan
from swarm.server.settings import ServerSettings

_KEPT_COPIES = 2
"""Of every position's activations: in the session's history, and beside a page that is remembered."""


@dataclass(frozen=True)
class Prepared:
    """What a server knows before it joins: checkpoint, device, precision, plan."""

    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    plan: MemoryPlan
    routed: RoutedTables = field(default_factory=dict)
    """Blocks whose routed experts are not all hosted here, and those of them that are for certain."""
    experts_as_fit: bool = False
    """Besides, as many of them as the plan has room for."""

    def expert_bytes(self, block: int) -> int:
        """What one routed expert of `block`, which is one of `routed`, occupies."""
        return self.routed[block][0].elements_of_one(self.checkpoint) * self.dtype.itemsize


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
    routed, as_fit = _routed(settings, checkpoint), settings.experts is not None and settings.experts.as_many_as_fit
    if as_fit and settings.blocks is None and settings.num_blocks is None:
        raise ValueError(
            "--experts auto gives experts the memory that blocks leave: say how many blocks, with --blocks A:B or "
            "--num-blocks N (or host experts only: --role experts)"
        )
    expert_sizes = {block: table.elements_of_one(checkpoint) * dtype.itemsize for block, (table, _) in routed.items()}
    plan = make_plan(
        [
            _block_bytes(checkpoint, block, settings.quantization, dtype, routed)
            for block in range(checkpoint.num_blocks)
        ],
        kv_bytes_per_position(checkpoint.config, dtype),
        memory_bytes,
        memory_from,
        blocks=settings.blocks,
        num_blocks=settings.num_blocks,
        kv_tokens=settings.kv_tokens,
        kept_bytes_per_position=_KEPT_COPIES * checkpoint.hidden_size * dtype.itemsize if device.type == "cpu" else 0,
        window_blocks=WINDOW_BLOCKS if settings.offload else 0,
        expert_bytes=[
            routed[block][0].count * expert_sizes[block] if block in routed else 0
            for block in range(checkpoint.num_blocks)
        ]
        if as_fit
        else (),
        largest_expert_bytes=max(expert_sizes.values(), default=1),
    )
    return Prepared(checkpoint, device, dtype, plan, routed, as_fit)


def _routed(settings: ServerSettings, checkpoint: Checkpoint) -> RoutedTables:
    if settings.experts is None:
        return {}
    if settings.quantization or settings.offload:
        raise ValueError("--experts does not go together with --quantize or --offload")
    tables = find_expert_tensors(checkpoint)
    hosted = settings.experts.hosted(tables, settings.model)
    kept = {block: hosted.get(block, frozenset()) for block in tables}
    return {block: (tables[block], experts) for block, experts in kept.items() if len(experts) < tables[block].count}


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


def _block_bytes(
    checkpoint: Checkpoint, block: int, quantization: str | None, dtype: torch.dtype, routed: RoutedTables
) -> int:
    """What a block's weights occupy once they are loaded."""
    if block in routed:
        tensors, kept = routed[block]
        elsewhere = tensors.elements_of_one(checkpoint) * (tensors.count - len(kept))
        return (checkpoint.block_elements(block) - elsewhere) * dtype.itemsize
    entries = [checkpoint.files.entries[name] for name in checkpoint.tensor_names(block)]
    each = [
        bytes_per_weight(quantization if len(entry.shape) == 2 else None, dtype) * entry.elements for entry in entries
    ]
    return int(sum(each))
