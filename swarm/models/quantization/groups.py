"""What schemes share: weights in groups with a scale of their own, what to do where they are not full, and parts of
weights of which there is to be no second copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.nn import functional

_CHUNK_WEIGHTS = 1 << 20
"""So many weights are dequantized at a time: they stay in a cache until they are used."""
_PART_WEIGHTS = 1 << 22
"""So many are quantized at a time, which takes several times the room that they occupy."""


def rounded_up(number: int, multiple: int) -> int:
    """The next multiple."""
    return -(-number // multiple) * multiple


def parts_of(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """``[outputs, inputs]``, some outputs at a time."""
    return iter(weight.split(max(1, _PART_WEIGHTS // weight.shape[1])))


def whole_groups(weight: torch.Tensor, group: int) -> torch.Tensor:
    """`weight` ``[outputs, inputs]`` as float32 ``[outputs, groups, group]``.

    A last group that is not full is filled up with its last weight, which changes no scale; rows get zeros there.
    """
    missing = -weight.shape[1] % group
    full = torch.cat([weight, weight[:, -1:].expand(-1, missing)], dim=1) if missing else weight
    return full.float().contiguous().unflatten(1, (-1, group))


def whole_rows(hidden_states: torch.Tensor, group: int) -> torch.Tensor:
    """``[…, inputs]`` as ``[rows, inputs]``, with zeros after the last input until groups are full."""
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    missing = -rows.shape[1] % group
    return functional.pad(rows, (0, missing)) if missing else rows


def multiply_by_chunks(
    rows: torch.Tensor, outputs: int, dequantize: Callable[[int, int], torch.Tensor], *, multiple: int = 1
) -> torch.Tensor:
    """``[rows, inputs]`` to ``[rows, outputs]``; never more than a chunk of the weight is dequantized.

    Args:
        dequantize: from and to which output; returns ``[inputs, to - from]`` in the dtype of `rows`.
        multiple: chunks begin at multiples of this.
    """
    step = rounded_up(max(1, _CHUNK_WEIGHTS // rows.shape[1]), multiple)
    bounds = [(first, min(first + step, outputs)) for first in range(0, outputs, step)]
    return torch.cat([rows @ dequantize(*chunk) for chunk in bounds], dim=1)
