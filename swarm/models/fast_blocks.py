"""Short steps of blocks built as Llama's, without what a transformers layer does around every operation.

Query, key and value are one multiplication, gate and up another; attention reads keys and values from their pages,
without a copy where these are neighbours. For families with rotary embeddings over whole heads and grouped queries.
Whether the result is that of the family's own code is tried when a server loads
(:func:`swarm.models.together.way_together`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from swarm.models.fused_linear import FusedLinear, PartOfFused
from swarm.models.llama_blocks import fuse_projections_of, is_like_llama
from swarm.models.paged_cache import PagedCache
from swarm.models.span import Span
from swarm.models.steps import Steps, position_ids_of


def blocks_of(span: Span) -> list[Block] | None:
    """The blocks of `span`, if all are built as Llama's, with their projections fused."""
    if not hasattr(span.base, "rotary_emb") or not all(is_like_llama(layer) for layer in span.layers):
        return None
    if not all(isinstance(part, PartOfFused) for layer in span.layers for part in _fused_parts(layer)):
        return None
    return [Block.of(layer, number) for number, layer in enumerate(span.layers)]


def fuse_projections(span: Span) -> None:
    """Make, in place, query, key and value one layer, and gate and up one, where blocks are built as Llama's.

    Blocks that are read from disk are left as they are in their files.
    """
    for layer in span.staying_layers():
        if is_like_llama(layer):
            fuse_projections_of(layer)


class FastBlocks:
    """A way to run sessions together (:class:`swarm.models.together.Together`), and one alone.

    All positions of all sessions are one ragged dimension, and only attention looks at them sequence by sequence.
    """

    runs_one_faster = True
    most_positions = 16

    def __init__(self, rotary: nn.Module, blocks: dict[int, Block]) -> None:
        self._rotary, self._blocks = rotary, blocks

    @classmethod
    def of(cls, span: Span) -> FastBlocks | None:
        """For all blocks of `span` and every part of it; None: they are built of other parts, or not fused."""
        blocks = blocks_of(span)
        return cls(span.base.rotary_emb, dict(enumerate(blocks, start=span.start))) if blocks is not None else None

    @torch.inference_mode()
    def forward(self, span: Span, steps: Steps) -> list[torch.Tensor]:
        """See :class:`swarm.models.together.Together`."""
        position_ids = position_ids_of(steps)
        states = torch.cat([states.reshape(-1, 1, states.shape[2]) for states, _, _ in steps])
        cos, sin = self._rotary(states, position_ids)
        half = sin.shape[-1] // 2
        turn = _Turn(cos, torch.cat([-sin[..., :half], sin[..., half:]], dim=-1), half)
        caches = _Caches([cache for _, cache, _ in steps])
        hidden = states.squeeze(1)
        for number in range(span.start, span.end):
            hidden = self._blocks[number].forward(hidden, turn, caches)
        outputs = hidden.split([states.shape[:2].numel() for states, _, _ in steps])
        return [output.view_as(states) for output, (states, _, _) in zip(outputs, steps, strict=True)]


@dataclass(frozen=True)
class _Turn:
    """Rotary embeddings of the positions: ``x · cos + (x with its halves exchanged) · sin``."""

    cos: torch.Tensor
    """[positions, 1, size]"""
    sin: torch.Tensor
    """Likewise, the first half negative."""
    half: int

    def of(self, heads: torch.Tensor) -> torch.Tensor:
        """``[positions, heads, size]`` turned."""
        return torch.addcmul(heads * self.cos, heads.roll(self.half, -1), self.sin)


class _Caches:
    """The caches of all sessions of a batch, sequence by sequence, with the positions begun last of each."""

    def __init__(self, caches: Sequence[PagedCache]) -> None:
        self.pool = caches[0].pool
        self.places = torch.cat([cache.places for cache in caches]) if len(caches) > 1 else caches[0].places
        self._sequences = [(cache, row) for cache in caches for row in range(cache.rows)]
        self._counts = [cache.length - cache.begun for cache, _ in self._sequences]
        self._views: dict[int | None, list[_View]] = {}

    def attend(self, number: int, query: torch.Tensor, scaling: float) -> torch.Tensor:
        """Attention in layer `number` of the pool, for ``[positions, key heads, queries of each, size]``."""
        keys, values = self.pool.keys[number], self.pool.values[number]
        parts = [
            _attend(part, _gathered(keys, view.runs), _gathered(values, view.runs), view.mask)
            for part, view in zip(
                (query * scaling).split(self._counts), self._views_within(self.pool.shapes[number].window), strict=True
            )
        ]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _views_within(self, window: int | None) -> list[_View]:
        if window not in self._views:
            self._views[window] = [_View.of(cache, row, window) for cache, row in self._sequences]
        return self._views[window]


@dataclass(frozen=True)
class _View:
    """What the positions of a sequence that were begun last look at."""

    runs: list[tuple[int, int]]
    """Where it stands in the pool."""
    mask: torch.Tensor | None
    """To be added to scores, ``[positions begun, 1, positions in runs]``; None: each sees all."""

    @classmethod
    def of(cls, cache: PagedCache, row: int, window: int | None) -> _View:
        count = cache.length - cache.begun
        seen = cache.length if window is None else min(cache.length, window + count - 1)
        runs = cache.runs(row, seen)
        if count == 1:
            return cls(runs, None)
        back = torch.arange(cache.begun, cache.length).view(-1, 1, 1) - torch.arange(cache.length - seen, cache.length)
        hidden = back < 0 if window is None else (back < 0) | (back >= window)
        mask = torch.zeros(hidden.shape, dtype=cache.pool.keys[0].dtype).masked_fill_(hidden, -torch.inf)
        return cls(runs, mask.to(cache.pool.device))


def _gathered(tensor: torch.Tensor, runs: Sequence[tuple[int, int]]) -> torch.Tensor:
    if len(runs) == 1:
        return tensor[:, runs[0][0] : runs[0][1]]
    return torch.cat([tensor[:, begin:end] for begin, end in runs], dim=1)


def _attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """``[n, heads, of each, size]``, with ``[heads, positions, size]`` of keys and of values; as `query`."""
    count, heads, each, size = query.shape
    scores = torch.bmm(query.transpose(0, 1).reshape(heads, -1, size), keys.transpose(1, 2))
    if mask is not None:
        scores = (scores.view(heads, count, each, -1) + mask).view(heads, count * each, -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return torch.bmm(weights, values).view(heads, count, each, size).transpose(0, 1)


@dataclass(frozen=True)
class Norm:
    """Root mean square."""

    weight: torch.Tensor
    eps: torch.Tensor
    """float32 ``[1, 1]``"""

    @classmethod
    def of(cls, module: nn.Module) -> Norm:
        """Of a family's own."""
        weight = module.weight
        return cls(weight, torch.full((1, 1), module.variance_epsilon, dtype=torch.float32, device=weight.device))

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """``[…, size]``; the norm in float32, as transformers does."""
        wide = states.float()
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        factor = torch.addcmul(self.eps, length, length, value=1 / states.shape[-1]).rsqrt_()
        return (wide * factor).to(states.dtype) * self.weight


@dataclass(frozen=True)
class Block:
    """The parts of a layer that is built as Llama's."""

    number: int
    """Of the layer in its pool."""
    before_attention: Norm
    projections: FusedLinear
    """Query, key, value."""
    of_query: Norm | None
    of_key: Norm | None
    heads: int
    key_heads: int
    size: int
    turns: bool
    scaling: float
    out: nn.Module
    before_mlp: Norm
    gate_up: FusedLinear
    activation: Callable[[torch.Tensor], torch.Tensor]
    down: nn.Module

    @classmethod
    def of(cls, layer: nn.Module, number: int) -> Block:
        """Of a layer of transformers'."""
        attention, mlp = layer.self_attn, layer.mlp
        size = attention.head_dim
        q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        return cls(
            number=number,
            before_attention=Norm.of(layer.input_layernorm),
            projections=attention.q_proj.fused,
            of_query=Norm.of(q_norm) if q_norm is not None else None,
            of_key=Norm.of(k_norm) if k_norm is not None else None,
            heads=attention.config.num_attention_heads,
            key_heads=attention.config.num_key_value_heads,
            size=size,
            turns=bool(getattr(attention, "use_rope", True)),
            scaling=attention.scaling,
            out=attention.o_proj,
            before_mlp=Norm.of(layer.post_attention_layernorm),
            gate_up=mlp.gate_proj.fused,
            activation=mlp.act_fn,
            down=mlp.down_proj,
        )

    def forward(self, hidden: torch.Tensor, turn: _Turn, caches: _Caches) -> torch.Tensor:
        """``[positions, hidden]``"""
        rows, heads, key_heads, size = hidden.shape[0], self.heads, self.key_heads, self.size
        projected = self.projections(self.before_attention(hidden)).view(rows, heads + 2 * key_heads, size)
        turned, values = projected.split([heads + key_heads, key_heads], dim=1)
        if self.of_query is not None and self.of_key is not None:
            query, keys = turned.split([heads, key_heads], dim=1)
            turned = torch.cat([self.of_query(query), self.of_key(keys)], dim=1)
        if self.turns:
            turned = turn.of(turned)
        query, keys = turned.split([heads, key_heads], dim=1)
        caches.pool.keys[self.number].index_copy_(1, caches.places, keys.transpose(0, 1))
        caches.pool.values[self.number].index_copy_(1, caches.places, values.transpose(0, 1))
        attended = caches.attend(self.number, query.view(rows, key_heads, heads // key_heads, size), self.scaling)
        hidden = hidden + self.out(attended.reshape(rows, heads * size))
        gate, up = self.gate_up(self.before_mlp(hidden)).chunk(2, dim=-1)
        return hidden + self.down(self.activation(gate) * up)


def _fused_parts(layer: nn.Module) -> list[nn.Module]:
    return [layer.self_attn.q_proj, layer.mlp.gate_proj]
