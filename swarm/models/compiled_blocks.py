"""Blocks built as Llama's as one call of compiled code: norms, rotary embeddings, attention, and all.

Where all weights of a span lie in panels (:mod:`swarm.models.native`), in float32 or quantized. What becomes of a
position does not depend, to the last bit, on what else runs with it. Whether the result is that of the family's own
code is tried when a server loads (:func:`swarm.models.together.way_together`).
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from swarm.models.fast_blocks import Block, Norm, blocks_of
from swarm.models.native import library as native
from swarm.models.native.panels import Panels, needed
from swarm.models.paged_cache import PagedCache, PagePool
from swarm.models.span import Span
from swarm.models.steps import Step, Steps, begin_together

_AT_ONCE = 256
"""Positions: what comes and goes within a block needs room for so many (a Llama of 8B: 50 MB)."""
_ROTATIONS_AT_A_TIME = 512
_MOST_ROTATIONS = 1 << 17
"""Positions beyond are rare; their rotations are computed when they come."""


class CompiledBlocks:
    """A way to run sessions together (:class:`swarm.models.together.Together`), and one alone."""

    runs_one_faster = True
    most_positions = 2048  # as many as clients send at once

    def __init__(self, rotary: nn.Module, blocks: Sequence[_Compiled]) -> None:
        self._rotations, self._blocks, self._hidden = _Rotations(rotary), blocks, blocks[0].hidden

    @classmethod
    def of(cls, span: Span) -> CompiledBlocks | None:
        """For all blocks of `span` and every part of it; None: that cannot be."""
        if span.dtype is not torch.float32 or span.device.type != "cpu":
            return None
        compiled = [_Compiled.of(block) for block in blocks_of(span) or ()]
        whole = [block for block in compiled if block is not None]
        return cls(span.base.rotary_emb, whole) if whole and len(whole) == len(compiled) else None

    def forward(self, span: Span, steps: Steps) -> list[torch.Tensor]:
        """See :class:`swarm.models.together.Together`."""
        if sum(states.shape[:2].numel() for states, _, _ in steps) <= _AT_ONCE:
            return self._forward(span, steps)
        return [torch.cat([self._forward(span, [part])[0] for part in _parts(step)], dim=1) for step in steps]

    @torch.inference_mode()
    def _forward(self, span: Span, steps: Steps) -> list[torch.Tensor]:
        caches, hidden = [cache for _, cache, _ in steps], steps[0][0].shape[2]
        cos, sin, rotations = self._rotations.of(begin_together(steps), steps[0][0])
        states = torch.cat([states.reshape(-1, hidden) for states, _, _ in steps]).float()
        slots = array("q", [slot for cache in caches for slot in cache.slots])
        if states.shape != (len(slots), self._hidden):  # compiled code takes it at its word
            raise ValueError(f"states {tuple(states.shape)} do not fit {len(slots)} positions of {self._hidden}")
        sequences, _runs = _sequences(caches)
        step = native.Step(
            len(slots), hidden, states.data_ptr(), cos.data_ptr(), sin.data_ptr(), _address(rotations),
            _address(slots), sequences, len(sequences),
        )  # fmt: skip
        first = span.start - caches[0].pool.first_layer
        _run(span, self._blocks[first : first + span.end - span.start], caches[0].pool, step)
        if len(steps) == 1:
            return [states.view_as(steps[0][0])]
        outputs = states.split([states.shape[:2].numel() for states, _, _ in steps])
        return [output.view_as(states) for output, (states, _, _) in zip(outputs, steps, strict=True)]


def _parts(step: Step) -> Iterator[Step]:
    """Of one session, to be run one after the other."""
    states, cache, ids = step
    each = max(1, _AT_ONCE // states.shape[0])
    for begin in range(0, states.shape[1], each):
        part = slice(begin, begin + each)
        yield states[:, part], cache, ids[:, part] if ids is not None else None


def _run(span: Span, blocks: Sequence[_Compiled], pool: PagePool, step: native.Step) -> None:
    """Those that are read from disk each by itself, and the others in as few calls as can be."""
    waiting: list[native.Block] = []

    def run_waiting() -> None:
        if waiting:
            needed().blocks((native.Block * len(waiting))(*waiting), step, torch.get_num_threads())
            waiting.clear()

    for number, block in enumerate(blocks, start=span.start):
        stream = span.offloaded.get(number)
        if stream is not None:
            run_waiting()
            stream.fetch(number)
        waiting.append(block.structure(pool))
        if stream is not None:
            run_waiting()
            stream.let_go()
    run_waiting()


class _Compiled:
    """A block, as compiled code takes it."""

    def __init__(self, block: Block, linears: Sequence[Panels]) -> None:
        self._number, self.hidden = block.number, linears[0].inputs
        self._held = block, linears  # the structures have only their addresses
        self._structure = native.Block(
            *(linear.structure() for linear in linears),
            *map(_norm, (block.before_attention, block.before_mlp, block.of_query, block.of_key)),
            block.heads, block.key_heads, block.size, block.turns, block.scaling,
        )  # fmt: skip
        self._pool: PagePool | None = None

    @classmethod
    def of(cls, block: Block) -> _Compiled | None:
        """None: something of it is none of what compiled code computes."""
        linears = [
            found for linear in (block.projections.linear, block.out, block.gate_up.linear, block.down)
            if (found := _panels(linear)) is not None
        ]  # fmt: skip
        if len(linears) < 4 or type(block.activation).__name__ not in ("SiLU", "SiLUActivation"):
            return None
        hidden, attended = block.before_attention.weight.numel(), block.heads * block.size
        inner = linears[2].outputs // 2
        expected = [
            (hidden, attended + 2 * block.key_heads * block.size),
            (attended, hidden),
            (hidden, 2 * inner),
            (inner, hidden),
        ]
        fits = [(linear.inputs, linear.outputs) for linear in linears] == expected
        return cls(block, linears) if fits else None

    def structure(self, pool: PagePool) -> native.Block:
        """Of this block, with keys and values in `pool`."""
        if self._pool is not pool:
            keys, values = pool.keys[self._number], pool.values[self._number]
            self._structure.keys, self._structure.values = keys.data_ptr(), values.data_ptr()
            self._structure.slots, self._structure.window = keys.shape[1], pool.shapes[self._number].window or 0
            self._pool = pool
        return self._structure


class _Rotations:
    """Rotary embeddings of positions, which are computed once."""

    def __init__(self, rotary: nn.Module) -> None:
        self._rotary = rotary
        self._cos = self._sin = torch.empty(0, 0)

    def of(self, positions: Sequence[int], states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, array[int]]:
        """(cos, sin: float32 ``[n, size]``; where those of each of `positions` are in them)

        Args:
            states: such as are to be turned.
        """
        least, most = min(positions), max(positions)
        if least < 0 or most >= _MOST_ROTATIONS:
            return *self._computed(states, torch.tensor(positions)), array("q", range(len(positions)))
        if most >= len(self._cos):
            count = (most // _ROTATIONS_AT_A_TIME + 1) * _ROTATIONS_AT_A_TIME
            self._cos, self._sin = self._computed(states, torch.arange(count))
        return self._cos, self._sin, array("q", positions)

    def _computed(self, states: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self._rotary(states, positions.view(1, -1))
        return cos.reshape(len(positions), -1).contiguous(), sin.reshape(len(positions), -1).contiguous()


def _norm(norm: Norm | None) -> native.Norm:
    return native.Norm(norm.weight.data_ptr(), float(norm.eps)) if norm is not None else native.Norm(None, 0.0)


def _panels(linear: Any) -> Panels | None:
    found: Panels | None = linear.panels() if hasattr(linear, "panels") else None
    return found


def _sequences(caches: Sequence[PagedCache]) -> tuple[ctypes.Array[native.Sequence], array[int]]:
    """(the sequences of a step; the runs at which they point, pairs of numbers, which must live as long)"""
    runs_of_each = [cache.runs(row, cache.length) for cache in caches for row in range(cache.rows)]
    runs = array("q", [end for of_one in runs_of_each for run in of_one for end in run])
    address, row = _address(runs), 0
    found = (native.Sequence * len(runs_of_each))()
    counts = [(cache.length - cache.begun, cache.begun) for cache in caches for _ in range(cache.rows)]
    for sequence, of_one, (rows, before) in zip(found, runs_of_each, counts, strict=True):
        sequence.first_row, sequence.rows, sequence.before = row, rows, before
        sequence.runs, sequence.run_count = address, len(of_one)
        address, row = address + len(of_one) * 2 * runs.itemsize, row + rows
    return found, runs


def _address(numbers: array[int]) -> int:
    return numbers.buffer_info()[0]
