"""Load experts by themselves, without the blocks that they belong to."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from swarm.models.checkpoint import Checkpoint
from swarm.models.experts.routed import compute_rows, keep_experts
from swarm.models.experts.tensors import ExpertTensors
from swarm.models.loading import load_part
from swarm.models.surgery import NumberedLayers, find_base, keep_only_layers


@dataclass(frozen=True)
class HostedExperts:
    """Some experts of one block, ready to compute. Made by :func:`load_experts`."""

    block: int
    kept: tuple[int, ...]
    """In ascending order."""
    module: nn.Module
    """transformers' own, with just these."""

    @property
    def weight_bytes(self) -> int:
        """What the weights occupy."""
        return sum(weight.numel() * weight.element_size() for weight in self.module.parameters())

    @torch.inference_mode()
    def compute(self, hidden_states: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """What expert ``experts[i]`` makes of ``hidden_states[i]``, not weighted.

        Args:
            hidden_states: ``[n, hidden]``, in the weights' precision and on their device.
            experts: ``[n]`` int64, all of them among `kept`.

        Returns:
            ``[n, hidden]``
        """
        numbers = torch.searchsorted(torch.tensor(self.kept, device=experts.device), experts)
        return compute_rows(self.module, hidden_states, numbers)


def load_experts(
    checkpoint: Checkpoint,
    tables: Mapping[int, ExpertTensors],
    hosted: Mapping[int, Collection[int]],
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    on_elements: Callable[[int], object] = lambda _: None,
) -> dict[int, HostedExperts]:
    """Read just the weights of the experts `hosted`, by block, and make them runnable.

    Args:
        tables: of the checkpoint (:func:`swarm.models.experts.find_expert_tensors`).
        hosted: no block without experts.
        on_elements: called with the number of elements of every tensor that was read, for a progress bar.

    Raises:
        CorruptCheckpoint: a tensor is missing or its block's checksum is wrong.
    """
    for block in hosted:
        checkpoint.verify(block)
    config = copy.deepcopy(checkpoint.config)
    config.tie_word_embeddings = False

    def cut(model: PreTrainedModel) -> None:
        keep_only_layers(model, sorted(hosted))
        for block, layer in _layers_of(model).items():
            path = tables[block].path
            keep_experts(layer.get_submodule(path), len(hosted[block]))
            _drop_all_but(layer, path.split("."))

    def select(tensors: Mapping[str, Any]) -> dict[str, Any]:
        for block in hosted:
            tensors = tables[block].select(tensors, sorted(hosted[block]))
        return dict(tensors)

    names = [name for block in hosted for name in tables[block].names(hosted[block])]
    model = load_part(checkpoint, config, names, cut, dtype, device, on_elements, select=select)
    checkpoint.files.release()
    layers = _layers_of(model)
    return {
        block: HostedExperts(block, tuple(sorted(kept)), layers[block].get_submodule(tables[block].path))
        for block, kept in hosted.items()
    }


def _layers_of(model: PreTrainedModel) -> dict[int, nn.Module]:
    numbered = next(child for child in find_base(model).children() if isinstance(child, NumberedLayers))
    return {int(name): layer for name, layer in numbered.named_children()}


def _drop_all_but(module: nn.Module, path: list[str]) -> None:
    """Take every weight and child out of `module`, but for the one that `path` leads to."""
    module._parameters.clear()
    module._buffers.clear()
    module._modules = {path[0]: module._modules[path[0]]}
    child = module._modules[path[0]]
    if len(path) > 1 and child is not None:
        _drop_all_but(child, path[1:])
