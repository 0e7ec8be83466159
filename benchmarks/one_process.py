"""A model in this process alone, run by what servers and clients run it with: a swarm without a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from swarm.client.remote_layers import RemoteCache
from swarm.models import Checkpoint, Span, load_shell, load_span
from swarm.models.weight_layout import lay_out_span


class OneProcess:
    """The client's shell, and spans as servers load them, one after another."""

    def __init__(self, checkpoint: Checkpoint, bounds: Sequence[tuple[int, int]]) -> None:
        spans = [load_span(checkpoint, start, end, dtype=checkpoint.default_dtype) for start, end in bounds]
        for span in spans:
            lay_out_span(span, checkpoint.hidden_size)
        self._layers = _SpansAsLayers(spans)
        self._shell: PreTrainedModel = load_shell(checkpoint, self._layers, dtype=checkpoint.default_dtype)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' ``generate()``, of an answer without a past."""
        return self._shell.generate(*args, past_key_values=RemoteCache(self._layers.begin()), **kwargs)


class _SpansAsLayers(nn.Module):
    """Stands where the layers were; to a :class:`RemoteCache`, it is the session."""

    def __init__(self, spans: Sequence[Span]) -> None:
        super().__init__()
        self._spans = spans
        self.begin()

    def begin(self) -> Any:
        """With empty caches."""
        self._caches = [span.new_cache() for span in self._spans]
        return self

    @property
    def position(self) -> int:
        return self._caches[0].length

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        for span, cache in zip(self._spans, self._caches, strict=True):
            hidden_states = span.forward(hidden_states, cache)
        return hidden_states
