"""Load blocks without all of their routed experts: leave weights out, and put ours where transformers' module was."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from swarm.models.experts.routed import RoutedExperts, keep_experts
from swarm.models.experts.shared import beside_routed
from swarm.models.experts.tensors import ExpertTensors

RoutedTables = Mapping[int, tuple[ExpertTensors, Collection[int]]]
"""Blocks whose routed experts are not all here: where those are in the checkpoint, and which of them are here."""


def cut_experts(layers: Mapping[int, nn.Module], split: RoutedTables) -> None:
    """Leave room in decoder layers (by block, on the meta device) just for the experts that are to be here."""
    for block, (tensors, kept) in split.items():
        if kept:
            keep_experts(layers[block].get_submodule(tensors.path), len(kept))
        else:
            _put(nn.Module(), layers[block], tensors.path)


def select(tensors: Mapping[str, Any], split: RoutedTables) -> Mapping[str, Any]:
    """Of lazy `tensors`, by their names on disk, those that are to be here."""
    for table, kept in split.values():
        tensors = table.select(tensors, sorted(kept))
    return tensors


def route_experts(layers: Mapping[int, nn.Module], split: RoutedTables) -> None:
    """Put ours into decoder layers that have been loaded."""
    for block, (tensors, kept) in split.items():
        here = layers[block].get_submodule(tensors.path) if kept else None
        routed = RoutedExperts(block, tensors.count, sorted(kept), here)
        beside_routed(_put(routed, layers[block], tensors.path), routed)


def _put(module: nn.Module, layer: nn.Module, path: str) -> nn.Module:
    """Returns the module that it is a child of now."""
    parent, _, name = path.rpartition(".")
    owner = layer.get_submodule(parent)
    setattr(owner, name, module)
    return owner
