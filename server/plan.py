"""Decide what fits, before anything is loaded. Pure: sizes in, a plan or a refusal out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from swarm.errors import InsufficientMemory

MIB = 1024**2
MIN_KV_TOKENS = 2048
"""Room for one conversation: with less a server is of little use."""
MAX_DEFAULT_KV_TOKENS = 65_536
PROCESS_BYTES = 320 * MIB
"""The interpreter, torch, transformers and p2pd (measured: docs/benchmarks.md)."""
WORKING_BYTES = 128 * MIB
"""Activations of the step that is being computed, frames on their way."""


@dataclass(frozen=True)
class MemoryPlan:
    """What a server will hold, in bytes."""

    memory_bytes: int
    memory_from: str
    """How `memory_bytes` came about, for people."""
    block_bytes: int
    """The weights of the largest block that may be hosted."""
    weight_bytes: int
    """Of all weights that are in memory at the same time."""
    kv_bytes_per_token: int
    """Per position, over all hosted blocks."""
    kv_tokens: int
    num_blocks: int
    """Blocks to host."""
    model_blocks: int
    kept_bytes_per_token: int = 0
    """Activations that are kept in this memory: what was sent on, to bring a replacement of the next server up to date,
    and what belongs to pages of KV cache that are remembered."""
    offloaded_blocks: int = 0
    """Of the blocks to host, so many are read from disk at every step."""
    window_blocks: int = 0
    """For them, there is memory for so many of the largest."""
    expert_bytes: int = 0
    """For routed experts, of which as many are held as fit."""

    @property
    def kept_bytes(self) -> int:
        return self.kv_tokens * self.kept_bytes_per_token

    @property
    def kv_bytes(self) -> int:
        return self.kv_tokens * self.kv_bytes_per_token

    @property
    def total_bytes(self) -> int:
        return PROCESS_BYTES + WORKING_BYTES + self.weight_bytes + self.expert_bytes + self.kv_bytes + self.kept_bytes

    @property
    def offloaded_bytes(self) -> int:
        """What is kept on disk, and read from there at every step, at most."""
        return self.offloaded_blocks * self.block_bytes

    def lines(self) -> list[str]:
        """The plan as a person reads it before anything is loaded."""
        per_block = self.kv_bytes_per_token // self.num_blocks
        weights = f"{self.num_blocks} of {self.model_blocks} blocks"
        if self.offloaded_blocks:
            staying = _blocks(self.num_blocks - self.offloaded_blocks)
            weights = f"{staying} for good, room for {self.window_blocks} of the others at a time"
        rows = [
            ("memory allowed", self.memory_bytes, self.memory_from),
            ("program, buffers", PROCESS_BYTES + WORKING_BYTES, "torch, p2pd, activations in flight"),
            ("weights", self.weight_bytes, weights),
            ("routed experts", self.expert_bytes, "whole blocks, then those that are asked for most; no more fit"),
            ("KV cache, at most", self.kv_bytes, f"{self.kv_tokens:,} positions, {size(per_block)} per block"),
            ("kept activations", self.kept_bytes, "at most: for recovery, and for prompts that begin alike"),
            ("total, at most", self.total_bytes, ""),
            ("read every step", self.offloaded_bytes, f"from disk: {_blocks(self.offloaded_blocks)}"),
        ]  # fmt: skip
        rows = [row for row in rows if row[1]]
        return [f"  {name:<18}{size(amount):>10}   {note}".rstrip() for name, amount, note in rows]


def make_plan(
    block_bytes: Sequence[int],
    kv_bytes_per_block: int,
    memory_bytes: int,
    memory_from: str,
    *,
    blocks: tuple[int, int] | None = None,
    num_blocks: int | None = None,
    kv_tokens: int | None = None,
    kept_bytes_per_position: int = 0,
    window_blocks: int = 0,
    expert_bytes: Sequence[int] = (),
    largest_expert_bytes: int = 1,
) -> MemoryPlan:
    """Choose how many blocks and how much KV cache to hold.

    If blocks may be read from disk at every step, or experts be computed elsewhere, memory goes to weights first, which
    speeds up every step, and only what is left goes to more than the least KV cache.

    Args:
        block_bytes: the weights of every block of the model, in memory.
        kv_bytes_per_block: per position and block.
        blocks: the span that the owner wants; None: as many blocks as fit.
        num_blocks: as many as the owner wants, if `blocks` is None.
        kv_tokens: as many positions as the owner wants; None: what is left, within reason.
        kept_bytes_per_position: of the activations that are kept, if that is the same memory.
        window_blocks: blocks that do not fit may be read from disk at every step, through memory for so many;
            as many blocks as fit are then those whose KV cache fits. 0: all blocks must fit.
        expert_bytes: of every block, the routed experts, which `block_bytes` leaves out and of which as many are to be
            held as fit. Only with `blocks` or `num_blocks`.
        largest_expert_bytes: a single expert; room for less than one is used for KV cache.

    Raises:
        InsufficientMemory: it does not fit; says how much is missing and what would fit.
    """
    model_blocks, largest = len(block_bytes), max(block_bytes)
    least_tokens = kv_tokens or MIN_KV_TOKENS
    least_kept = least_tokens * kept_bytes_per_position
    program = PROCESS_BYTES + WORKING_BYTES
    usable = memory_bytes - program
    fitting = min(model_blocks, max(0, usable - least_kept) // (largest + least_tokens * kv_bytes_per_block))
    if window_blocks:
        spare = usable - least_kept - (window_blocks + 1) * largest
        fitting = max(fitting, min(model_blocks, max(0, spare) // (least_tokens * kv_bytes_per_block)))
    wanted = (blocks[1] - blocks[0]) if blocks else num_blocks
    count = max(fitting, 1) if wanted is None else wanted
    weights = _bytes_of(block_bytes, blocks, count)
    hosted_largest = max(block_bytes[slice(*blocks)]) if blocks else largest
    room = usable - least_kept - least_tokens * kv_bytes_per_block * count
    offloaded = 0
    if window_blocks and weights > room:
        held = max(room // hosted_largest, window_blocks + 1)
        if held * hosted_largest < weights:
            weights, offloaded = held * hosted_largest, count - held + window_blocks
    needed = weights + least_tokens * kv_bytes_per_block * count + least_kept
    if needed > usable:
        raise InsufficientMemory(
            f"{_blocks(count)} with {least_tokens:,} positions of KV cache"
            f"{f', {count - offloaded + window_blocks} of them in memory at a time,' if offloaded else ''} need "
            f"{size(needed + program, round_up=True)} "
            f"(of which {size(program)} for the program), "
            f"but only {size(memory_bytes)} are allowed ({memory_from}). "
            + (f"{_blocks(fitting)} would fit: --num-blocks {fitting}. " if fitting else "")
            + f"Allow more with --memory, {'offer fewer --kv-tokens, ' if kv_tokens and weights < usable else ''}"
            + "host fewer blocks, or choose a smaller --dtype."
        )
    experts = 0
    if expert_bytes:
        spare = usable - needed
        experts = min(spare - spare % largest_expert_bytes, _bytes_of(expert_bytes, blocks, count))
    affordable = (usable - weights - experts) // (kv_bytes_per_block * count + kept_bytes_per_position)
    return MemoryPlan(
        memory_bytes=memory_bytes,
        memory_from=memory_from,
        block_bytes=hosted_largest,
        weight_bytes=weights,
        kv_bytes_per_token=kv_bytes_per_block * count,
        kv_tokens=kv_tokens or min(affordable, MAX_DEFAULT_KV_TOKENS),
        num_blocks=count,
        model_blocks=model_blocks,
        kept_bytes_per_token=kept_bytes_per_position,
        offloaded_blocks=offloaded,
        window_blocks=window_blocks if offloaded else 0,
        expert_bytes=experts,
    )


def _bytes_of(block_bytes: Sequence[int], blocks: tuple[int, int] | None, count: int) -> int:
    """Of the span `blocks`, or of any `count` of them, at most."""
    return sum(block_bytes[slice(*blocks)]) if blocks else count * max(block_bytes)


def size(count: int, *, round_up: bool = False) -> str:
    """A number of bytes as people write it: ``13.5 MiB``; `round_up`: never less than `count`."""
    text, rolls_over = f"{count} B", count >= 1024
    for unit, factor in (("KiB", 1024), ("MiB", MIB), ("GiB", 1024**3)):
        if rolls_over:
            tenths = -(-count * 10 // factor) if round_up else round(count * 10 / factor)
            text, rolls_over = f"{tenths / 10:.1f} {unit}", tenths >= 1024 * 10
    return text


def _blocks(count: int) -> str:
    return "1 block" if count == 1 else f"{count} blocks"
