"""Decide what fits, before anything is loaded. Pure: sizes in, a plan or a refusal out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from swarm.errors import InsufficientMemory

MIB = 1024**2
MIN_KV_TOKENS = 2048
"""Room for one conversation: with less a server is of little use."""
MAX_DEFAULT_KV_TOKENS = 65_536
PROCESS_BYTES = 450 * MIB
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
    kv_bytes_per_token: int
    """Per position, over all hosted blocks."""
    kv_tokens: int
    num_blocks: int
    """Blocks to host."""
    model_blocks: int

    @property
    def kv_bytes(self) -> int:
        return self.kv_tokens * self.kv_bytes_per_token

    @property
    def total_bytes(self) -> int:
        return PROCESS_BYTES + WORKING_BYTES + self.weight_bytes + self.kv_bytes

    def lines(self) -> list[str]:
        """The plan as a person reads it before anything is loaded."""
        per_block = self.kv_bytes_per_token // self.num_blocks
        rows = [
            ("memory allowed", self.memory_bytes, self.memory_from),
            ("program, buffers", PROCESS_BYTES + WORKING_BYTES, "torch, p2pd, activations in flight"),
            ("weights", self.weight_bytes, f"{self.num_blocks} of {self.model_blocks} blocks"),
            ("KV cache, at most", self.kv_bytes, f"{self.kv_tokens:,} positions, {size(per_block)} per block"),
            ("total, at most", self.total_bytes, ""),
        ]  # fmt: skip
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
) -> MemoryPlan:
    """Choose how many blocks and how much KV cache to hold.

    Args:
        block_bytes: the weights of every block of the model, in memory.
        kv_bytes_per_block: per position and block.
        blocks: the span that the owner wants; None: as many blocks as fit.
        num_blocks: as many as the owner wants, if `blocks` is None.
        kv_tokens: as many positions as the owner wants; None: what is left, within reason.

    Raises:
        InsufficientMemory: it does not fit; says how much is missing and what would fit.
    """
    model_blocks, largest = len(block_bytes), max(block_bytes)
    usable = memory_bytes - PROCESS_BYTES - WORKING_BYTES
    least_tokens = kv_tokens or MIN_KV_TOKENS
    fitting = min(model_blocks, max(0, usable) // (largest + least_tokens * kv_bytes_per_block))
    wanted = (blocks[1] - blocks[0]) if blocks else num_blocks
    count = max(fitting, 1) if wanted is None else wanted
    weights = sum(block_bytes[slice(*blocks)]) if blocks else count * largest
    needed = weights + least_tokens * kv_bytes_per_block * count
    if needed > usable:
        raise InsufficientMemory(
            f"{_blocks(count)} with {least_tokens:,} positions of KV cache need "
            f"{size(needed + PROCESS_BYTES + WORKING_BYTES, round_up=True)} "
            f"(of which {size(PROCESS_BYTES + WORKING_BYTES)} for the program), "
            f"but only {size(memory_bytes)} are allowed ({memory_from}). "
            + (f"{_blocks(fitting)} would fit: --num-blocks {fitting}. " if fitting else "")
            + f"Allow more with --memory, {'offer fewer --kv-tokens, ' if kv_tokens and weights < usable else ''}"
            + "host fewer blocks, or choose a smaller --dtype."
        )
    affordable = (usable - weights) // (kv_bytes_per_block * count)
    return MemoryPlan(
        memory_bytes=memory_bytes,
        memory_from=memory_from,
        block_bytes=max(block_bytes[slice(*blocks)]) if blocks else largest,
        weight_bytes=weights,
        kv_bytes_per_token=kv_bytes_per_block * count,
        kv_tokens=kv_tokens or min(affordable, MAX_DEFAULT_KV_TOKENS),
        num_blocks=count,
        model_blocks=model_blocks,
    )


def size(count: int, *, round_up: bool = False) -> str:
    """A number of bytes as people write it: ``13.5 MiB``; `round_up`: never less than `count`."""
    for unit, factor in (("GiB", 1024**3), ("MiB", MIB), ("KiB", 1024)):
        if count >= factor:
            return f"{-(-count * 10 // factor) / 10 if round_up else count / factor:.1f} {unit}"
    return f"{count} B"


def _blocks(count: int) -> str:
    return "1 block" if count == 1 else f"{count} blocks"
