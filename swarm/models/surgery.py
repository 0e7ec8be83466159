"""Cut a transformers model in two: the decoder layers, and the shell around them.

Nothing here knows a family. A *span* keeps a few decoder layers and replaces every other module that
holds weights by one that holds none; hidden states enter by a hook before the first layer and leave by
one after the last, so whatever the base model does around its layers (scaling embeddings, adding
positions, normalising) happens where its weights are: in the *shell*, which keeps everything except
the layers. Masks, rotary embeddings and layer types stay transformers' own on both sides.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from swarm.errors import UnsupportedFamily


class NumberedLayers(nn.ModuleList):
    """Some of a model's layers under their original numbers, so that checkpoint names still fit."""

    def __init__(self, layers: dict[int, nn.Module]) -> None:
        super().__init__()
        for number, layer in layers.items():
            self.add_module(str(number), layer)


class _NoEmbedding(nn.Module):
    """Stands where an embedding was: contributes nothing, and holds no weights."""

    def forward(self, ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(*ids.shape, 1, device=ids.device)


class _LayerOutput(torch.Tensor):
    """Hidden states that serve as either thing that families' layers return: themselves, or a tuple with them first."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # whatever is computed from it is a plain tensor

    def __getitem__(self, index: Any) -> torch.Tensor:
        plain = self.as_subclass(torch.Tensor)
        return plain if isinstance(index, int) and index == 0 else plain[index]


class InPlaceOfLayers(nn.Module):
    """Calls another module, and returns what it returns as the family's layers would."""

    def __init__(self, replacement: nn.Module) -> None:
        super().__init__()
        self.replacement = replacement

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        hidden_states: torch.Tensor = self.replacement(*args, **kwargs)
        return hidden_states.as_subclass(_LayerOutput)


class _PassThrough(nn.Module):
    """Stands where a norm or a projection was: returns its input."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states


def find_base(model: PreTrainedModel) -> PreTrainedModel:
    """The family's base model (``LlamaModel`` inside ``LlamaForCausalLM``)."""
    base: PreTrainedModel = model.base_model
    return base


def layers_attribute(base: PreTrainedModel) -> str:
    """The name under which `base` holds its decoder layers: ``layers``, ``h``, ….

    Raises:
        UnsupportedFamily: if there is no list with one module per decoder layer.
    """
    depth = base.config.num_hidden_layers
    for name, child in base.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == depth:
            return name
    raise UnsupportedFamily(
        f"{base.config.model_type} models are not supported: {type(base).__name__} has no list of "
        f"{depth} decoder layers that could be cut into spans."
    )


def keep_only_layers(model: PreTrainedModel, blocks: Iterable[int]) -> None:
    """Drop, in place, every weight of `model` outside `blocks`."""
    base = find_base(model)
    attribute = layers_attribute(base)
    layers = getattr(base, attribute)
    setattr(base, attribute, NumberedLayers({number: layers[number] for number in blocks}))
    _replace_weights(base, keep=attribute)
    if model is not base:
        _replace_weights(model, keep=next(name for name, child in model.named_children() if child is base))


def drop_layers(model: PreTrainedModel, replacement: nn.Module) -> None:
    """Put `replacement`, which returns hidden states, where `model` had all its decoder layers, in place."""
    base = find_base(model)
    setattr(base, layers_attribute(base), nn.ModuleList([InPlaceOfLayers(replacement)]))


def _replace_weights(parent: nn.Module, keep: str) -> None:
    for name, child in list(parent.named_children()):
        if name == keep or not any(True for _ in child.parameters()):
            continue
        setattr(parent, name, _NoEmbedding() if isinstance(child, nn.Embedding) else _PassThrough())
