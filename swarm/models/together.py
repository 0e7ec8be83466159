"""Run the next position of many sequences in one pass, although each has a KV cache of its own.

Everything in a decoder layer but attention treats each position by itself, so the weights need to be read only once
for all of them (continuous batching: Yu et al. 2022, "Orca"). Attention looks at one session at a time: it is called
through transformers' attention interface, and there handed on to the family's own function with just that session's
keys and values. A step of a single position without padding needs no mask, whatever the family's windows, sinks or
caps; families that make attention in a way of their own are found by :func:`way_together` and left alone.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, PretrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from swarm.models.span import Span, SpanCache

logger = logging.getLogger(__name__)

_IMPLEMENTATION = "swarm_together"
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
_HALF_TOLERANCE = 5e-2


class CachesTogether(Cache):  # type: ignore[misc]
    """What a model sees in place of a cache: as many caches as there are sessions.

    Args:
        rows: the sequences of each session.
        padded: hand layers all keys and values, made equally long, because they do something with them before attention
            (latent attention). If not, they are taken from the caches, and layers see only the new ones.
    """

    def __init__(self, caches: Sequence[SpanCache], rows: Sequence[int], *, padded: bool) -> None:
        super().__init__(layers=[])
        self._rows, self._padded = list(rows), padded
        self._caches = list(caches)
        self._of_this_layer: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add every session's keys and values to its cache; :meth:`attend` will find them there."""
        new = zip(self._caches, key_states.split(self._rows), value_states.split(self._rows), strict=True)
        self._of_this_layer = [cache.update(keys, values, layer_idx, *args, **kwargs) for cache, keys, values in new]
        if not self._padded:
            return key_states, value_states
        keys, values = zip(*self._of_this_layer, strict=True)
        return _equally_long(keys), _equally_long(values)

    def attend(
        self,
        attention: Callable[..., Any],
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Call `attention` for every session with its part of `query` ``[rows, heads, 1, size]``."""
        of_each = self._of_this_layer
        if self._padded:
            lengths = [keys.shape[2] for keys, _ in of_each]
            parts = zip(key.split(self._rows), value.split(self._rows), lengths, strict=True)
            of_each = [(keys[:, :, :length], values[:, :, :length]) for keys, values, length in parts]
        outputs = [
            attention(module, part, keys, values, None, **kwargs)[0]
            for part, (keys, values) in zip(query.split(self._rows), of_each, strict=True)
        ]
        return torch.cat(outputs), None


@dataclass(frozen=True)
class Together:
    """A way to run sessions together that gives what each would get alone; found by :func:`way_together`."""

    padded: bool

    @torch.inference_mode()
    def forward(
        self, span: Span, steps: Sequence[tuple[torch.Tensor, SpanCache, torch.Tensor | None]]
    ) -> list[torch.Tensor]:
        """Run one position of each sequence of several sessions, as :meth:`Span.forward` would run them one by one.

        Args:
            steps: of every session the hidden states ``[rows, 1, hidden]``, its cache, and ``position_ids``
                ``[rows, 1]`` (default: the position that follows). No session may have padding.

        Returns:
            ``[rows, 1, hidden]`` of every session.
        """
        rows = [states.shape[0] for states, _, _ in steps]
        position_ids = [
            ids if ids is not None else torch.full((count, 1), cache.length, device=span.device)
            for (_, cache, ids), count in zip(steps, rows, strict=True)
        ]
        caches = CachesTogether([cache for _, cache, _ in steps], rows, padded=self.padded)
        with _attention_of(caches, span):
            output = span.forward(torch.cat([states for states, _, _ in steps]), caches, torch.cat(position_ids))
        return list(output.split(rows))


def way_together(span: Span, hidden_size: int) -> Together | None:
    """How sessions can run together on `span`; None: only one by one. Tried with two made-up sessions."""
    if any(_rotates_by_length(config) for config in span.configs):
        return None
    ways = (Together(padded=False), Together(padded=True))
    return next((way for way in ways if _works(way, span, hidden_size)), None)


def _rotates_by_length(config: PretrainedConfig) -> bool:
    """Whether rotary embeddings change for all positions when one of them is beyond some length."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters, *(one for one in parameters.values() if isinstance(one, dict))]
    return any(one.get("rope_type") in ("dynamic", "longrope") for one in kinds)


def _works(way: Together, span: Span, hidden_size: int) -> bool:
    random = torch.Generator().manual_seed(0)

    def states(rows: int, positions: int) -> torch.Tensor:
        return torch.randn(rows, positions, hidden_size, generator=random).to(span.device, span.dtype)

    prompts, tokens = [states(1, 3), states(2, 7)], [states(1, 1), states(2, 1)]
    alone, together = ([span.new_cache() for _ in prompts] for _ in range(2))
    for prompt, cache, other in zip(prompts, alone, together, strict=True):
        span.forward(prompt, cache)
        span.forward(prompt, other)
    expected = [span.forward(token, cache) for token, cache in zip(tokens, alone, strict=True)]
    try:
        found = way.forward(span, [(token, cache, None) for token, cache in zip(tokens, together, strict=True)])
    except Exception as error:  # whatever a family of models does not take
        logger.debug("sessions cannot run together in this way: %r", error)
        return False
    tolerance = _TOLERANCE.get(span.dtype, _HALF_TOLERANCE)
    return all(
        one.shape == other.shape and float((one - other).float().norm()) <= tolerance * float(one.float().norm())
        for one, other in zip(expected, found, strict=True)
    )


def _equally_long(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    longest = max(tensor.shape[2] for tensor in tensors)
    return torch.cat([functional.pad(tensor, (0, 0, 0, longest - tensor.shape[2])) for tensor in tensors])


_running: ContextVar[tuple[CachesTogether, str]] = ContextVar("_running")
"""The caches, and the name of the attention function that is called for each."""


@contextmanager
def _attention_of(caches: CachesTogether, span: Span) -> Iterator[None]:
    usual: str = span.configs[0]._attn_implementation
    token = _running.set((caches, usual))
    try:
        for config in span.configs:
            config._attn_implementation = _IMPLEMENTATION
        yield
    finally:
        for config in span.configs:
            config._attn_implementation = usual
        _running.reset(token)


def _attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: object, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """What the attention interface calls; masks are not made for functions that the mask interface does not know."""
    caches, usual = _running.get()
    attention = ALL_ATTENTION_FUNCTIONS.get(usual)
    if attention is None:  # "eager" is each family's own
        attention = sys.modules[type(module).__module__].eager_attention_forward
    return caches.attend(attention, module, query, key, value, **kwargs)


AttentionInterface.register(_IMPLEMENTATION, _attention)
