"""Which tensors of a checkpoint are routed experts', and whose: a server reads just those that it hosts.

Checkpoints hold a block's experts one by one (``….experts.7.w1.weight``) or stacked, one tensor for all. transformers'
own table of conversions tells which tensors become part of the module that computes the experts; nothing here knows a
family.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from swarm.errors import UnsupportedFamily
from swarm.models.checkpoint import Checkpoint, block_of
from swarm.models.loading import make_skeleton

_NUMBER = re.compile(r"(?<=\.experts\.)\d+(?=\.)")


@dataclass(frozen=True)
class ExpertTensors:
    """Those of one block."""

    count: int
    """Experts of the block, numbered from 0."""
    path: str
    """The module that computes them, by its name within the decoder layer: ``mlp.experts``."""
    expert_of: Mapping[str, int | None]
    """By names on disk: whose a tensor is; None: it holds a part of every expert, one after another along its first
    dimension."""

    def names(self, kept: Collection[int]) -> list[str]:
        """The tensors that the experts `kept` need."""
        return [name for name, expert in self.expert_of.items() if kept and (expert is None or expert in kept)]

    def elements_of_one(self, checkpoint: Checkpoint) -> int:
        """How many numbers the weights of one expert are."""
        total = sum(checkpoint.files.entries[name].elements for name in self.expert_of)
        return total // self.count

    def select(self, tensors: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
        """Of lazy `tensors` (by names on disk) those of the experts `kept`, as if the block had no others: they are
        numbered anew, in ascending order. What is no expert's stays."""
        numbers = {expert: number for number, expert in enumerate(sorted(kept))}
        selected: dict[str, Any] = {}
        for name, tensor in tensors.items():
            if name not in self.expert_of:
                selected[name] = tensor
            elif (expert := self.expert_of[name]) is None:
                if kept:
                    selected[name] = _SomeRows(tensor, sorted(kept))
            elif expert in numbers:
                selected[_NUMBER.sub(str(numbers[expert]), name)] = tensor
        return selected


class _SomeRows:
    """A lazy tensor of which only some rows are read."""

    def __init__(self, lazy: Any, rows: Sequence[int]) -> None:
        self._lazy, self._rows = lazy, rows

    def __getitem__(self, index: Any) -> torch.Tensor:
        whole: torch.Tensor = torch.cat([self._lazy[row : row + 1] for row in self._rows])[index]
        return whole


def is_expert_module(module: nn.Module) -> bool:
    """Whether it is one of those that transformers calls as ``experts(hidden_states, top_k_index, top_k_weights)``."""
    return hasattr(module, "_is_expert_parallel") and hasattr(module, "num_experts")  # set by its decorator


def find_expert_tensors(checkpoint: Checkpoint) -> dict[int, ExpertTensors]:
    """By block; blocks without routed experts (all, in a dense model) are left out.

    Raises:
        UnsupportedFamily: the experts are stored in a way that cannot be taken apart.
    """
    skeleton = make_skeleton(copy.deepcopy(checkpoint.config), lambda _: None)
    modules = {name: module for name, module in skeleton.named_modules() if is_expert_module(module)}
    if not modules:
        return {}
    found: dict[str, dict[str, int | None]] = {}
    for name, target in _targets(checkpoint, skeleton):
        owner = target.rpartition(".")[0]
        if owner in modules:
            number = _NUMBER.search(name)
            found.setdefault(owner, {})[name] = int(number[0]) if number else None
    tables: dict[int, ExpertTensors] = {}
    for owner, expert_of in found.items():
        count = int(modules[owner].num_experts)
        block = block_of(owner)
        stacks = [name for name, expert in expert_of.items() if expert is None]
        if block is None or any(checkpoint.files.entries[name].shape[0] != count for name in stacks):
            raise UnsupportedFamily(
                f"{checkpoint.name} keeps its experts in a way that cannot be taken apart ({', '.join(stacks[:2])}); "
                "host whole blocks."
            )
        path = owner.split(f".{block}.", 1)[1]
        tables[block] = ExpertTensors(count, path, expert_of)
    return tables


def _targets(checkpoint: Checkpoint, skeleton: PreTrainedModel) -> Iterator[tuple[str, str]]:
    """Every tensor of a block, and the parameter of the model that it becomes, or becomes a part of."""
    conversions = get_model_conversion_mapping(skeleton)
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    parameters = skeleton.state_dict()
    for name in checkpoint.files.entries:
        if block_of(name) is not None:
            yield name, rename_source_key(name, renamings, converters, skeleton.base_model_prefix, parameters)[0]
