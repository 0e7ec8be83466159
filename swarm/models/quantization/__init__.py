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
from swarm.models.quantization.int8 import Int8Linear
from swarm.models.quantization.nf4 import Nf4Linear

_KINDS: dict[str, type[Int8Linear | Nf4Linear | Int4Linear]] = {
    "int8": Int8Linear, "nf4": Nf4Linear, "int4": Int4Linear,
}  # fmt: skip

SCHEMES = tuple(_KINDS)
"""What weights may be quantized to."""

QUANTIZED_LINEARS = tuple(_KINDS.values())
"""What takes the place of linear layers."""

SCHEMES_ON = {"cpu": SCHEMES, "cuda": ("int8", "nf4")}
"""Likewise, by type of device."""

SCHEMES_FOR_FILES = ("int8",)
"""Those whose weights can be kept in a file as they are in memory."""

_ROUNDING = {Int8Linear: 2e-3, Nf4Linear: 5e-2, Int4Linear: 5e-2}
"""To 16 bits of a row's greatest number, or to bfloat16. Measured with SmolLM2, 15 blocks: 3e-4, -, 4e-3."""

_BYTES_PER_WEIGHT = {"int8": int8.BYTES_PER_WEIGHT, "nf4": nf4.BYTES_PER_WEIGHT, "int4": int4.BYTES_PER_WEIGHT}


def bytes_per_weight(scheme: str | None, dtype: torch.dtype) -> float:
    """What a weight of a linear layer occupies, with its share of scales where they are more than next to nothing."""
    return dtype.itemsize if scheme is None else _BYTES_PER_WEIGHT[scheme]


def quantize_linears(module: nn.Module, scheme: str, *, for_file: bool = False) -> None:
    """Replace, in place, every linear layer in `module` by one of `scheme` (one of :data:`SCHEMES`).

    Args:
        for_file: what is in memory can be kept in a file, and is the same on every machine. A module on the meta
            device becomes what such a file is read into.

    Raises:
        ValueError: there is no such scheme, or none that can be kept in a file.
    """
    if scheme not in (SCHEMES_FOR_FILES if for_file else SCHEMES):
        raise ValueError(f"{scheme!r} is none of {', '.join(SCHEMES_FOR_FILES if for_file else SCHEMES)}")
    for name, child in module.named_children():
        if isinstance(child, nn.Linear | Conv1D):
            weight = child.weight.data.t() if isinstance(child, Conv1D) else child.weight.data
            kind = _KINDS[scheme]
            setattr(module, name, (Int8Linear.for_file if for_file else kind.quantize)(weight, child.bias))
        else:
            quantize_linears(child, scheme, for_file=for_file)


def form_in_files(scheme: str | None) -> str | None:
    """Names, for a scheme, how weights lie in the files of this machine: what has another name is another file."""
    return f"{scheme}-panels" if scheme is not None and int8.panels_in_files() else scheme


def rounding(module: nn.Module) -> float:
    """By what share of its size the output of some ten blocks may change when what enters layers in `module` changes in
    the last bits of float32: layers round it, and now and then to another level. 0: no layer is quantized."""
    return max((_ROUNDING[type(each)] for each in module.modules() if type(each) in _ROUNDING), default=0.0)


def quantized_head(head: nn.Linear) -> Int8Linear:
    """A copy of the layer that makes logits, in 8 bits whatever the scheme of the others."""
    return Int8Linear.quantize(head.weight.data, head.bias)
