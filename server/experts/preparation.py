"""What a server of experts knows before it joins: checkpoint, device, precision, and what fits."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from swarm.errors import InsufficientMemory
from swarm.models import Checkpoint, open_checkpoint
from swarm.models.experts import ExpertTensors, find_expert_tensors
from swarm.server.machine import allowed_memory, choose_device
from swarm.server.plan import PROCESS_BYTES, WORKING_BYTES, size
from swarm.server.settings import ServerSettings


@dataclass(frozen=True)
class PreparedExperts:
    """What a server of experts knows before it joins."""

    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    tables: Mapping[int, ExpertTensors]
    """Of the blocks that have routed experts."""
    memory_bytes: int
    memory_from: str
    """How `memory_bytes` came about, for people."""
    wanted: Mapping[int, frozenset[int]] | None
    """By block; None: as many as fit, where they are needed most."""

    @property
    def room_bytes(self) -> int:
        """For weights."""
        return self.memory_bytes - PROCESS_BYTES - WORKING_BYTES

    @property
    def model_shape(self) -> list[int]:
        """How many experts each block of the model has; 0: it is dense."""
        blocks = range(self.checkpoint.num_blocks)
        return [self.tables[block].count if block in self.tables else 0 for block in blocks]

    @property
    def expert_sizes(self) -> list[int]:
        """Bytes of one expert of each block; 0: it has none."""
        return [self.expert_bytes(block) if block in self.tables else 0 for block in range(self.checkpoint.num_blocks)]

    def expert_bytes(self, block: int) -> int:
        """What one expert of `block` occupies."""
        return self.tables[block].elements_of_one(self.checkpoint) * self.dtype.itemsize

    def weight_bytes(self, hosted: Mapping[int, Collection[int]]) -> int:
        """What these occupy."""
        return sum(self.expert_bytes(block) * len(experts) for block, experts in hosted.items())

    def lines(self, hosted: Mapping[int, Collection[int]]) -> list[str]:
        """The plan as a person reads it before anything is loaded."""
        count, weights = sum(map(len, hosted.values())), self.weight_bytes(hosted)
        of = sum(table.count for table in self.tables.values())
        program = PROCESS_BYTES + WORKING_BYTES
        rows = [
            ("memory allowed", self.memory_bytes, self.memory_from),
            ("program, buffers", program, "torch, p2pd, activations in flight"),
            ("weights", weights, f"{count} of {of} experts"),
            ("total, at most", program + weights, ""),
        ]
        return [f"  {name:<18}{size(amount):>10}   {note}".rstrip() for name, amount, note in rows]


def prepare_experts(settings: ServerSettings) -> PreparedExperts:
    """Open the checkpoint and see what fits; nothing is loaded and nobody is contacted.

    Raises:
        ModelError, InsufficientMemory: as they say.
        ValueError: the settings contradict the model or the machine.
    """
    checkpoint = open_checkpoint(
        settings.model, revision=settings.revision, allow_untested=settings.allow_untested_family
    )
    if settings.quantization or settings.offload:
        raise ValueError("experts are neither quantized nor offloaded as yet; leave --quantize and --offload out")
    tables = find_expert_tensors(checkpoint)
    if not tables:
        raise ValueError(f"{settings.model} has no routed experts: its blocks are hosted whole, with --blocks")
    device = choose_device(settings.device)
    memory_bytes, memory_from = allowed_memory(device, settings.memory_bytes)
    asked = settings.experts if settings.experts is not None and not settings.experts.as_many_as_fit else None
    wanted = asked.hosted(tables, settings.model) if asked is not None else None
    prepared = PreparedExperts(
        checkpoint, device, settings.dtype or checkpoint.default_dtype, tables, memory_bytes, memory_from, wanted
    )
    if wanted is not None and not wanted:
        raise ValueError("a server of experts must host some; `none` is for servers of blocks, with --blocks")
    least = prepared.weight_bytes(wanted) if wanted is not None else min(map(prepared.expert_bytes, tables))
    if least > prepared.room_bytes:
        what = f"{sum(map(len, wanted.values()))} experts" if wanted is not None else "even one expert"
        raise InsufficientMemory(
            f"{what} would need {size(least + PROCESS_BYTES + WORKING_BYTES, round_up=True)} (of which "
            f"{size(PROCESS_BYTES + WORKING_BYTES)} for the program), but only {size(memory_bytes)} are allowed "
            f"({memory_from}). Allow more with --memory, host fewer --experts, or choose a smaller --dtype."
        )
    return prepared
