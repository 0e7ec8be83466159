"""Load a model's shell: everything but the decoder layers, with one module of ours in their place."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

from swarm.models.batched_head import BatchedHead
from swarm.models.checkpoint import Checkpoint
from swarm.models.draft_head import draft_of
from swarm.models.loading import load_part, model_class_of
from swarm.models.packed_linear import LinearWithCopy
from swarm.models.quantization import quantized_head
from swarm.models.shortcut import find_shortcut, with_shortcut
from swarm.models.surgery import drop_layers
from swarm.models.weight_layout import lay_out_head

_ATTENTION_ELSEWHERE = "swarm_elsewhere"
"""transformers makes no mask for an attention that it does not know; the layers' servers make theirs."""


def load_shell(
    checkpoint: Checkpoint,
    layers: nn.Module,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    model_class: Callable[[type[PreTrainedModel]], type[PreTrainedModel]] = lambda family: family,
    quantized_layers: bool = False,
    looks_ahead: bool = False,
    on_elements: Callable[[int], object] = lambda _: None,
) -> PreTrainedModel:
    """The family's own ``…ForCausalLM`` with embeddings, final norm and head, and `layers` instead of its layers.

    Args:
        layers: called as a decoder layer is, with hidden states ``[batch, positions, hidden]``; for single tokens
            perhaps with these alone (:mod:`swarm.models.shortcut`).
        model_class: makes a subclass of the family's class, to instantiate instead of it.
        quantized_layers: `layers` have quantized weights: let the head be quantized, too, on a CPU.
        looks_ahead: the head is to say soon what is likeliest, with a draft where that is sooner
            (:mod:`swarm.models.draft_head`).

    Raises:
        CorruptCheckpoint: a tensor is missing, or the shell's checksum is wrong.
    """
    checkpoint.verify(None)
    family = model_class_of(checkpoint.config)
    shell = load_part(
        checkpoint,
        copy.deepcopy(checkpoint.config),
        checkpoint.tensor_names(None),
        lambda model: drop_layers(model, layers),
        dtype,
        device,
        on_elements,
        model_class(with_shortcut(family)),
    )
    shell.config._attn_implementation = _ATTENTION_ELSEWHERE
    if isinstance(head := shell.get_output_embeddings(), nn.Linear):
        shell.set_output_embeddings(_head_in_place_of(head, quantized=quantized_layers, looks_ahead=looks_ahead))
    find_shortcut(shell, family)
    return shell


def _head_in_place_of(head: nn.Linear, *, quantized: bool, looks_ahead: bool) -> BatchedHead:
    if quantized and head.weight.is_cpu:
        return BatchedHead(LinearWithCopy(head, quantized_head(head)), looks_ahead=looks_ahead)
    laid_out = lay_out_head(head)
    return BatchedHead(laid_out, draft_of(head, laid_out) if looks_ahead else None, looks_ahead=looks_ahead)
