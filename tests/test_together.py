"""Sessions that run as one batch get what each would get alone, in every family whose attention allows it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_families import SUPPORTED
from tiny_models import TINY_MODELS, save_tiny_model

from swarm.models import Span, compiled_blocks, load_span, open_checkpoint
from swarm.models.compiled_blocks import CompiledBlocks
from swarm.models.fast_blocks import FastBlocks, fuse_projections
from swarm.models.paged_cache import PagedCache, PagePool
from swarm.models.quantization import int4, int8
from swarm.models.together import ThroughLayers, Together, way_together
from swarm.models.weight_layout import Layout, lay_out_span

ONE_BY_ONE = {"bloom", "falcon", "falcon-alibi", "falcon-new-decoder", "phi3-longrope"}
"""Their attention does not pass through transformers' interface, or a long sequence would change others' rotations."""
PADDED = {"deepseek_v3"}
"""Their layers make keys and values of what is in the cache."""
FAST = {
    "llama", "llama-tied", "llama-yarn", "mistral", "mistral-full", "qwen2", "qwen2-sliding", "qwen3", "smollm3",
}  # fmt: skip
"""They are built of the parts of Llama's blocks."""
LENGTHS, ROWS, STEPS = (3, 9, 1, 14), (1, 2, 1, 3), 8
COUNTS = ((1, 1, 1, 1), (1, 5, 1, 2), (7, 1, 3, 1), (4, 2, 6, 5))
"""Positions of each session in a step; where only single ones can run together, always one."""


def span_of(name: str, directory: Path) -> tuple[Span, int]:
    save_tiny_model(name, directory)
    checkpoint = open_checkpoint(directory)
    return load_span(checkpoint, 1, 4, dtype=torch.float32), checkpoint.hidden_size


def states(rows: int, positions: int, hidden: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, positions, hidden, generator=torch.Generator().manual_seed(seed))


def paged(span: Span, hidden: int, count: int) -> list[PagedCache]:
    pool = PagePool.for_span(span, hidden, pages=4 * count)
    return [pool.new_cache(span.start, span.end, 48) for _ in range(count)]


def run_paged(span: Span, prompt: torch.Tensor, cache: PagedCache) -> torch.Tensor:
    cache.begin(*prompt.shape[:2])
    return span.forward(prompt, cache)


def lay_out_in_panels(span: Span, hidden: int) -> None:
    lay_out_span(span, hidden, lambda linears: {linear.weight.shape: Layout.PANELS for linear in linears})


@pytest.mark.parametrize("name", SUPPORTED)
def test_together_is_as_alone_through_a_familys_own_layers(name: str, tmp_path: Path) -> None:
    span, hidden = span_of(name, tmp_path)
    assert FastBlocks.of(span) is None and CompiledBlocks.of(span) is None
    way = way_together(span, hidden)
    assert way == (None if name in ONE_BY_ONE else ThroughLayers(padded=name in PADDED))
    if way is not None:
        run_together_and_alone(way, span, hidden)


@pytest.mark.parametrize("name", SUPPORTED)
@pytest.mark.parametrize("kind", [FastBlocks, CompiledBlocks])
def test_together_is_as_alone_in_a_fast_way(
    name: str, kind: type[FastBlocks] | type[CompiledBlocks], tmp_path: Path
) -> None:
    span, hidden = span_of(name, tmp_path)
    fuse_projections(span)
    if kind is CompiledBlocks:
        lay_out_in_panels(span, hidden)
    blocks = kind.of(span)
    assert (blocks is not None) == (name in (FAST | {"granite"}))
    way = way_together(span, hidden, blocks)
    assert (way is blocks and blocks is not None) == (name in FAST)
    if way is blocks and way is not None:
        run_together_and_alone(way, span, hidden)


def run_together_and_alone(way: Together, span: Span, hidden: int) -> None:
    alone = [span.new_cache() for _ in LENGTHS]
    together = paged(span, hidden, sum(ROWS))[: len(LENGTHS)]
    for cache, other, length, rows in zip(alone, together, LENGTHS, ROWS, strict=True):
        prompt = states(rows, length, hidden, seed=length)
        torch.testing.assert_close(
            run_paged(span, prompt, other), span.forward(prompt, cache), atol=1e-4, rtol=1e-4
        )  # fmt: skip
    for step in range(STEPS):  # crosses every sliding window
        counts = [min(count, way.most_positions) for count in COUNTS[step % len(COUNTS)]]
        tokens = [states(rows, n, hidden, seed=100 * step + rows) for rows, n in zip(ROWS, counts, strict=True)]
        expected = [span.forward(token, cache) for token, cache in zip(tokens, alone, strict=True)]
        found = way.forward(span, [(token, cache, None) for token, cache in zip(tokens, together, strict=True)])
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert [cache.length for cache in together] == [cache.get_seq_length() for cache in alone]


def test_a_fast_way_that_gives_something_else_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    span, hidden = span_of("llama", tmp_path)
    fuse_projections(span)
    fast = FastBlocks.of(span)
    assert fast is not None
    monkeypatch.setattr(fast, "_rotary", lambda states, ids: (torch.ones(1, 1, 16), torch.zeros(1, 1, 16)))
    assert way_together(span, hidden, fast) == ThroughLayers(padded=False)
    assert "other results than transformers" in caplog.text


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding", "qwen3"])
@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
def test_compiled_blocks_give_the_same_bits_in_any_company(
    name: str, scheme: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (int8, int4):  # another kernel may be faster for weights as small as these
        monkeypatch.setattr(module, "KERNELS", [kernel for kernel in module.KERNELS if kernel.name == "panels"])
    save_tiny_model(name, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    hidden = checkpoint.hidden_size
    span = load_span(checkpoint, 1, 4, dtype=torch.float32, quantization=scheme)
    fuse_projections(span)
    if scheme is None:
        lay_out_in_panels(span, hidden)
    way = CompiledBlocks.of(span)
    assert way is not None and way_together(span, hidden, way) is way
    caches = paged(span, hidden, 8)
    together, alone = caches[:4], caches[4:]
    for cache, other, length in zip(together, alone, LENGTHS, strict=True):
        prompt = states(1, length, hidden, seed=length)
        run_paged(span, prompt, cache)
        run_paged(span, prompt, other)
    for step in range(STEPS):
        tokens = [states(1, n, hidden, seed=100 * step + n) for n in COUNTS[step % len(COUNTS)]]
        found = way.forward(span, [(token, cache, None) for token, cache in zip(tokens, together, strict=True)])
        torch.set_num_threads(2)
        each = [way.forward(span, [(token, cache, None)])[0] for token, cache in zip(tokens, alone, strict=True)]
        torch.set_num_threads(1)
        assert all(torch.equal(one, other) for one, other in zip(found, each, strict=True))


@pytest.mark.parametrize("size, heads, key_heads", [(20, 4, 2), (64, 6, 2), (80, 3, 3), (128, 5, 1)])
@pytest.mark.parametrize("window", [None, 40])
def test_a_prompt_gives_the_same_bits_in_any_pieces(
    size: int, heads: int, key_heads: int, window: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, fields = TINY_MODELS["mistral"]
    shape = {"head_dim": size, "num_attention_heads": heads, "num_key_value_heads": key_heads}
    room = {"max_position_embeddings": 256, "sliding_window": window}
    monkeypatch.setitem(TINY_MODELS, "mistral", (family, {**fields, **shape, **room}))
    span, hidden = span_of("mistral", tmp_path)
    fuse_projections(span)
    lay_out_in_panels(span, hidden)
    way = CompiledBlocks.of(span)
    assert way is not None
    prompt = states(1, 150, hidden, seed=1)
    expected = span.forward(prompt, span.new_cache())
    pool = PagePool.for_span(span, hidden, pages=40)
    found = []
    for pieces in ([150], [64, 64, 22], [1, 5, 70, 1, 73], [1] * 150):
        cache = pool.new_cache(span.start, span.end, 150)
        torch.set_num_threads(len(pieces) % 2 + 1)
        parts = [way.forward(span, [(piece, cache, None)])[0] for piece in prompt.split(pieces, dim=1)]
        torch.set_num_threads(1)
        found.append(torch.cat(parts, dim=1))
        cache.release()
    monkeypatch.setattr(compiled_blocks, "_AT_ONCE", 50)
    cache = pool.new_cache(span.start, span.end, 150)
    found += way.forward(span, [(prompt, cache, torch.arange(150).view(1, -1))])
    assert (found[0] - expected).norm() < 1e-5 * expected.norm()
    assert all(torch.equal(one, found[0]) for one in found)


def test_positions_far_beyond_all_others_are_rotated_like_them(tmp_path: Path) -> None:
    span, hidden = span_of("llama", tmp_path)
    fuse_projections(span)
    lay_out_in_panels(span, hidden)
    compiled, fast, caches = CompiledBlocks.of(span), FastBlocks.of(span), paged(span, hidden, 2)
    assert compiled is not None and fast is not None
    for ids in (torch.tensor([[3]]), torch.tensor([[600]]), torch.tensor([[1 << 20]])):
        token = states(1, 1, hidden, seed=int(ids))
        (found,) = compiled.forward(span, [(token, caches[0], ids)])
        (expected,) = fast.forward(span, [(token, caches[1], ids)])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_positions_that_the_client_gives_are_used(tmp_path: Path) -> None:
    span, hidden = span_of("llama", tmp_path)
    alone, together = [span.new_cache() for _ in range(2)], paged(span, hidden, 2)
    prompt, token, ids = states(1, 4, hidden, seed=1), states(1, 1, hidden, seed=2), torch.tensor([[11]])
    for cache in alone:
        span.forward(prompt, cache)
    for cache in together:
        run_paged(span, prompt, cache)
    expected = [span.forward(token, alone[0], ids), span.forward(token, alone[1])]
    found = ThroughLayers(padded=False).forward(span, [(token, together[0], ids), (token, together[1], None)])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found[0], found[1], atol=1e-4)


def test_a_span_runs_alone_again_afterwards(tmp_path: Path) -> None:
    span, hidden = span_of("gpt_oss", tmp_path)
    prompt, token = states(1, 5, hidden, seed=1), states(1, 1, hidden, seed=2)
    before = span.forward(prompt, span.new_cache())
    caches = paged(span, hidden, 2)
    for cache in caches:
        run_paged(span, prompt, cache)
    way = ThroughLayers(padded=False)
    way.forward(span, [(token, cache, None) for cache in caches])
    with pytest.raises(RuntimeError):
        way.forward(span, [(token[..., :-1], cache, None) for cache in caches])
    assert torch.equal(span.forward(prompt, span.new_cache()), before)
