"""Multiply floating-point rows with 8-bit weights as a weighted sum of table rows, which fbgemm does for embeddings.

An output is the sum of its weights, each times an input: a bag of an embedding table whose rows hold the weights of an
input. fbgemm compiles code for such sums on the machine (AVX2 and AVX-512): it turns bytes into floating-point numbers
in registers, and reads nothing but bytes. Each block of outputs is a table of its own, so that its sums stay in
registers while its bytes are read from the first to the last. Rows are not rounded.

Measured on a busy Zen 3 (AVX2, no VNNI), one thread, 576 inputs to 960 outputs, best of four, µs at 1 / 2 / 4 / 8 rows:
fp32 as oneDNN packs it 393 / 457 / 539 / 579, so 110 / 165 / 247 / 445.
"""

from __future__ import annotations

import functools

import torch
from torch.nn import functional

from swarm.models.quantization.groups import multiply_by_chunks
from swarm.models.quantization.int8_levels import Int8Levels

_FEW_ROWS = 16
"""Each of them reads all weights: more are faster multiplied with dequantized ones."""

_MOST_OUTPUTS = 96
"""In a block: fbgemm keeps these sums in 12 registers of AVX2. Twice as many take twice as long."""
_LEAST_OUTPUTS = 64
_VECTOR = 8
_PARAMETERS = torch.tensor([1.0, -128.0])
"""What fbgemm multiplies bytes by and adds, which it reads behind every table row."""
_PARAMETER_BYTES = _PARAMETERS.nbytes

OVERHEAD = 0.1
"""Bytes beyond one for a weight: 8 to a row of at most 96, and what it takes to fill blocks."""


class Bags:
    """Few rows as bags of embeddings; for more, weights are dequantized and multiplied as usual."""

    name = "bags"

    def arrange(self, levels: Int8Levels) -> tuple[torch.Tensor, torch.Tensor]:
        outputs, inputs = levels.levels.shape
        block = _block(outputs)
        padded = functional.pad(levels.levels, (0, 0, 0, -outputs % block))
        tables = torch.empty(len(padded) // block, inputs, block + _PARAMETER_BYTES, dtype=torch.uint8)
        tables[..., :block] = (padded.unflatten(0, (-1, block)).transpose(1, 2) ^ -128).view(torch.uint8)
        tables[..., block:] = _PARAMETERS.view(torch.uint8)
        return tables.flatten(0, 1), levels.scale

    def restore(self, *arranged: torch.Tensor) -> Int8Levels:
        tables, scale = arranged
        block = tables.shape[1] - _PARAMETER_BYTES
        by_inputs = tables[:, :block].unflatten(0, (-(-len(scale) // block), -1))
        levels = by_inputs.transpose(1, 2).flatten(0, 1)[: len(scale)]
        return Int8Levels((levels ^ 128).view(torch.int8), scale)

    def multiply(self, rows: torch.Tensor, *arranged: torch.Tensor) -> torch.Tensor:
        tables, scale = arranged
        product = _sums(rows, tables) if len(rows) <= _FEW_ROWS else _dequantized_product(rows, tables)
        return product[:, : len(scale)] * scale


def _sums(rows: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    count, inputs = rows.shape
    blocks = len(tables) // inputs
    indices, offsets = _indices(count, blocks, inputs)
    sums: torch.Tensor = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
        tables, indices, offsets, per_sample_weights=rows.unsqueeze(1).expand(-1, blocks, -1).reshape(-1)
    )
    return sums.view(count, -1)


def _dequantized_product(rows: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    blocks = tables[:, :-_PARAMETER_BYTES].unflatten(0, (-1, rows.shape[1]))
    count, inputs, block = blocks.shape

    def dequantize(first: int, to: int) -> torch.Tensor:
        part = blocks[first // block : to // block].transpose(0, 1)
        return torch.empty(part.shape).copy_(part).sub_(128).view(inputs, -1)

    return multiply_by_chunks(rows, count * block, dequantize, multiple=block)


def _block(outputs: int) -> int:
    """How many outputs to a block, so that they take the least room."""
    if outputs <= _MOST_OUTPUTS:
        return -(-outputs // _VECTOR) * _VECTOR
    sizes = range(_MOST_OUTPUTS, _LEAST_OUTPUTS - 1, -_VECTOR)
    return min(sizes, key=lambda block: -(-outputs // block) * (block + _PARAMETER_BYTES))


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _indices(rows: int, blocks: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All table rows once for each of `rows`, and where bags begin."""
    indices = torch.arange(blocks * inputs, dtype=torch.int32).repeat(rows)
    return indices, torch.arange(0, len(indices), inputs, dtype=torch.int32)
