"""Run the next positions of many sequences in one pass, although each has a KV cache of its own.

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
from typing import Any, ClassVar, Protocol

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, PretrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from swarm.models.compiled_blocks import CompiledBlocks
from swarm.models.fast_blocks import FastBlocks, fuse_projections
from swarm.models.paged_cache import PagedCache, PagePool
from swarm.models.quantization import rounding
from swarm.models.span import Span
from swarm.models.steps import Steps, position_ids_of
from swarm.models.weight_layout import lay_out_span
from swarm.page_names import PAGE

logger = logging.getLogger(__name__)

_IMPLEMENTATION = "swarm_together"
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
_HALF_TOLERANCE = 5e-2


class CachesTogether(Cache):  # type: ignore[misc]
    """What a model sees in place of a cache: as many caches as there are sessions, all of one pool.

    Args:
        padded: hand layers all keys and values, made equally long, because they do something with them before attention
            (latent attention). If not, they are taken from the caches, and layers see only the new ones.
    """

    def __init__(self, caches: Sequence[PagedCache], rows: Sequence[int], *, padded: bool) -> None:
        super().__init__(layers=[])
        self._rows, self._padded = list(rows), padded
        self._caches = list(caches)
        self._places = torch.cat([cache.places for cache in caches])
        self._of_this_layer: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add every session's keys and values to its cache; :meth:`attend` will find them there."""
        layers = [cache.at(layer_idx) for cache in self._caches]
        self._caches[0].pool.write(layers[0].number, self._places, key_states, value_states)
        self._of_this_layer = [layer.read() for layer in layers]
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


class Together(Protocol):
    """A way to run sessions together that gives what each would get alone; found by :func:`way_together`."""

    runs_one_faster: bool
    """It is also the faster way for a single session."""
    most_positions: int
    """A step of so many positions at most can run in this way."""

    def forward(self, span: Span, steps: Steps) -> list[torch.Tensor]:
        """Run the next positions of several sessions, as :meth:`Span.forward` would run them one by one.

        No session may have padding. Returns ``[rows, n, hidden]`` of every session.
        """
        ...


@dataclass(frozen=True)
class ThroughLayers:
    """The model's own layers, with attention session by session."""

    padded: bool
    runs_one_faster: ClassVar[bool] = False
    most_positions: ClassVar[int] = 1

    @torch.inference_mode()
    def forward(self, span: Span, steps: Steps) -> list[torch.Tensor]:
        """See :class:`Together`."""
        rows = [states.shape[0] for states, _, _ in steps]
        position_ids = position_ids_of(steps)
        caches = CachesTogether([cache for _, cache, _ in steps], rows, padded=self.padded)
        with _attention_of(caches, span):
            output = span.forward(torch.cat([states for states, _, _ in steps]), caches, position_ids)
        return list(output.split(rows))


def prepare_span(span: Span, hidden_size: int) -> Together | None:
    """Make a span that was just loaded as fast as it can be; returns how sessions can run together on it."""
    fuse_projections(span)
    lay_out_span(span, hidden_size)
    return way_together(span, hidden_size, CompiledBlocks.of(span), FastBlocks.of(span))


def way_together(span: Span, hidden_size: int, *fast: Together | None) -> Together | None:
    """How sessions can run together on `span`; None: only one by one. Tried with two made-up sessions.

    Args:
        fast: take the first of these ways that gives what the model's own layers give.
    """
    if any(_rotates_by_length(config) for config in span.configs):
        return None
    for way in fast:
        if way is not None:
            if _works(way, span, hidden_size):
                return way
            logger.warning(
                "%s, a fast way to run these blocks, give other results than transformers: not used", type(way).__name__
            )
    ways = (ThroughLayers(padded=False), ThroughLayers(padded=True))
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

    prompts, tokens = [states(1, 3), states(2, 7)], [states(1, 1), states(2, min(20, way.most_positions))]
    pool = PagePool.for_span(span, hidden_size, pages=6)
    alone = [span.new_cache() for _ in prompts]
    together = [pool.new_cache(span.start, span.end, 2 * PAGE) for _ in prompts]
    for prompt, cache, paged in zip(prompts, alone, together, strict=True):
        span.forward(prompt, cache)
        paged.begin(*prompt.shape[:2])
        span.forward(prompt, paged)
    expected = [span.forward(token, cache) for token, cache in zip(tokens, alone, strict=True)]
    try:
        found = way.forward(span, [(token, cache, None) for token, cache in zip(tokens, together, strict=True)])
    except Exception as error:  # whatever a family of models does not take
        logger.debug("sessions cannot run together in this way: %r", error)
        return False
    tolerance = max(_TOLERANCE.get(span.dtype, _HALF_TOLERANCE), *map(rounding, span.staying_layers()))
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
