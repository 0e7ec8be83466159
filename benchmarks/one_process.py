"""A model in this process alone, run by what servers and clients run it with: a swarm without a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from swarm.client.remote_layers import RemoteCache
from swarm.models import Checkpoint, Span, load_shell, load_span
from swarm.models.paged_cache import PagedCache, PagePool
from swarm.models.pages import pages_for
from swarm.models.together import prepare_span

_POSITIONS = 1024


class OneProcess:
    """The client's shell, and spans as servers load them, one after another."""

    def __init__(self, checkpoint: Checkpoint, bounds: Sequence[tuple[int, int]]) -> None:
        spans = [load_span(checkpoint, start, end, dtype=checkpoint.default_dtype) for start, end in bounds]
        self._layers = _SpansAsLayers([_Executor(span, checkpoint.hidden_size) for span in spans])
        self._shell: PreTrainedModel = load_shell(checkpoint, self._layers, dtype=checkpoint.default_dtype)
        self.config = self._shell.config

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' ``generate()``, of an answer without a past."""
        return self._shell.generate(*args, past_key_values=RemoteCache(self._layers.begin()), **kwargs)


class _Executor:
    """A span with one session, run as a server runs it."""

    def __init__(self, span: Span, hidden_size: int) -> None:
        self.span, self.together = span, prepare_span(span, hidden_size)
        self._pool = PagePool.for_span(span, hidden_size, pages=pages_for(_POSITIONS))
        self.cache = self._new_cache()

    def begin(self) -> None:
        """With an empty cache."""
        self.cache.release()
        self.cache = self._new_cache()

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        rows, count, _ = hidden_states.shape
        if count == 1 and self.together is not None and self.together.runs_one_faster:
            return self.together.forward(self.span, [(hidden_states, self.cache, None)])[0]
        self.cache.begin(rows, count)
        return self.span.forward(hidden_states, self.cache)

    def _new_cache(self) -> PagedCache:
        return self._pool.new_cache(self.span.start, self.span.end, _POSITIONS)


class _SpansAsLayers(nn.Module):
    """Stands where the layers were; to a :class:`RemoteCache`, it is the session."""

    def __init__(self, spans: Sequence[_Executor]) -> None:
        super().__init__()
        self._spans = spans

    def begin(self) -> Any:
        """With empty caches."""
        for span in self._spans:
            span.begin()
        return self

    @property
    def position(self) -> int:
        return self._spans[0].cache.length

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        for span in self._spans:
            hidden_states = span(hidden_states)
        return hidden_states
