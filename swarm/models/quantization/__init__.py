"""Hold the linear layers of a span in 8 or 4 bits: more fits, and a decode step, which reads every weight, is faster.

``int8`` is for every machine, ``nf4`` for GPUs and new CPUs, ``int4`` for CPUs. Everything that is no linear layer
(norms, biases) stays as it is. How a scheme's levels are multiplied is chosen on each machine
(:mod:`swarm.models.quantization.kernels`); what they mean is the same everywhere.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from swarm.models.quantization import int4, int8, nf4
from swarm.models.quantization.int4 import Int4Linear
from swarm.models.quantization.int8 import BytesOfLast, Int8Linear
from swarm.models.quantization.nf4 import Nf4Linear

SCHEMES = ("int8", "nf4", "int4")
"""What weights may be quantized to."""

QUANTIZED_LINEARS = (Int8Linear, Nf4Linear, Int4Linear)
"""What takes the place of linear layers."""

SCHEMES_ON = {"cpu": SCHEMES, "cuda": ("int8", "nf4")}
"""Likewise, by type of device."""

SCHEMES_FOR_FILES = ("int8",)
"""Those whose weights can be kept in a file as they are in memory."""

_BYTES_PER_WEIGHT = {"int8": int8.BYTES_PER_WEIGHT, "nf4": nf4.BYTES_PER_WEIGHT, "int4": int4.BYTES_PER_WEIGHT}


def bytes_per_weight(scheme: str | None, dtype: torch.dtype) -> float:
    """What a weight of a linear layer occupies, with its share of scales where they are more than next to nothing."""
    return dtype.itemsize if scheme is None else _BYTES_PER_WEIGHT[scheme]


def quantize_linears(
    module: nn.Module, scheme: str, *, for_file: bool = False, memory: BytesOfLast | None = None
) -> None:
    """Replace, in place, every linear layer in `module` by one of `scheme` (one of :data:`SCHEMES`).

    Args:
        for_file: what is in memory can be kept in a file, and is the same on every machine. A module on the meta
            device becomes what such a file is read into.

    Raises:
        ValueError: there is no such scheme, or none that can be kept in a file.
    """
    if scheme not in (SCHEMES_FOR_FILES if for_file else SCHEMES):
        raise ValueError(f"{scheme!r} is none of {', '.join(SCHEMES_FOR_FILES if for_file else SCHEMES)}")
    memory = memory or BytesOfLast()
    for name, child in module.named_children():
        if isinstance(child, nn.Linear | Conv1D):
            weight = child.weight.data.t() if isinstance(child, Conv1D) else child.weight.data
            quantized = (
                Int8Linear.for_file(weight, child.bias, memory)
                if for_file
                else _quantized(weight, child.bias, scheme, memory)
            )
            setattr(module, name, quantized)
        else:
            quantize_linears(child, scheme, for_file=for_file, memory=memory)


def computes_in_bfloat16(module: nn.Module) -> bool:
    """Whether layers in `module` round what they are given to bfloat16, and what they return."""
    return any(isinstance(each, Int4Linear | Nf4Linear) for each in module.modules())


def quantized_head(head: nn.Linear) -> Int8Linear:
    """A copy of the layer that makes logits, in 8 bits whatever the scheme of the others."""
    return Int8Linear.quantize(head.weight.data, head.bias, BytesOfLast())


def _quantized(weight: torch.Tensor, bias: torch.Tensor | None, scheme: str, memory: BytesOfLast) -> nn.Module:
    if scheme == "int8":
        return Int8Linear.quantize(weight, bias, memory)
    return (Int4Linear if scheme == "int4" else Nf4Linear).quantize(weight, bias)
