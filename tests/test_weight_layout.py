"""Weights in huge pages and in another order are the same weights."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny_model

from swarm.models import Span, load_span, open_checkpoint, weight_layout
from swarm.models.fast_blocks import fuse_projections
from swarm.models.native.panels import PanelLinear, can_use_panels
from swarm.models.packed_linear import LinearWithCopy, PackedLinear, can_pack
from swarm.models.weight_layout import Layout, Layouts, lay_out_head, lay_out_span

_HIDDEN_SIZE = 576


def _load(blocks: int) -> Span:
    return load_span(open_checkpoint("smollm2"), 0, blocks, dtype=torch.float32)


def _run(span: Span) -> torch.Tensor:
    cache = span.new_cache()
    prompt = torch.randn(2, 7, _HIDDEN_SIZE, generator=torch.Generator().manual_seed(1))
    return torch.cat([span.forward(prompt, cache), span.forward(prompt[:, :1], cache)], dim=1)


def _matrices(span: Span) -> list[torch.Tensor]:
    """Every weight of the span, in the order of its modules."""
    modules = [module for layer in span.layers for module in layer.modules()]
    return [_plain(module, weight) for module in modules for weight in module.parameters(recurse=False)]


def _plain(module: torch.nn.Module, weight: torch.Tensor) -> torch.Tensor:
    if isinstance(module, PanelLinear):
        return module.dense()
    return weight.to_dense() if weight.is_mkldnn else weight.clone()


def _all(layout: Layout) -> Callable[[Sequence[torch.nn.Module]], Layouts]:
    return lambda linears: {weight_layout._matrix(linear).shape: layout for linear in linears}


def test_the_layout_changes_neither_weights_nor_results() -> None:
    span = _load(5)  # large enough to be timed
    assert span.weight_bytes >= weight_layout._SAMPLE_BYTES
    weights, output = _matrices(span), _run(span)
    lay_out_span(span, _HIDDEN_SIZE)
    assert all(torch.equal(before, now) for before, now in zip(weights, _matrices(span), strict=True))
    torch.testing.assert_close(_run(span), output, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", Layout)
def test_weights_in_any_layout_are_the_same_weights(layout: Layout) -> None:
    span = _load(1)
    weights, output = _matrices(span), _run(span)
    lay_out_span(span, _HIDDEN_SIZE, _all(layout))
    laid_out = [weight for weight in span.weights() if weight.dim() > 1]
    assert [weight.is_mkldnn for weight in laid_out] == [layout is Layout.PACKED] * len(laid_out)
    assert [weight.dim() == 3 for weight in laid_out] == [layout is Layout.PANELS] * len(laid_out)
    if layout in (Layout.AS_LOADED, Layout.TRANSPOSED):
        assert [weight.is_contiguous() for weight in laid_out] == [layout is Layout.AS_LOADED] * len(laid_out)
    assert all(torch.equal(before, now) for before, now in zip(weights, _matrices(span), strict=True))
    torch.testing.assert_close(_run(span), output, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", Layout)
def test_fused_layers_compute_what_their_parts_did(layout: Layout) -> None:
    span = _load(1)
    output, size = _run(span), span.weight_bytes
    fuse_projections(span)
    assert torch.equal(_run(span), output) or torch.allclose(_run(span), output, rtol=1e-4, atol=1e-4)
    lay_out_span(span, _HIDDEN_SIZE, _all(layout))
    torch.testing.assert_close(_run(span), output, rtol=1e-4, atol=1e-4)
    assert span.weight_bytes == size


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "gpt_oss", "bloom", "qwen2", "deepseek_v3", "phimoe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout, kind", [(Layout.PACKED, PackedLinear), (Layout.PANELS, PanelLinear)])
def test_other_families_can_lie_in_blocks_where_the_machine_can(
    name: str, dtype: torch.dtype, layout: Layout, kind: type[torch.nn.Module], tmp_path: Path
) -> None:
    save_tiny_model(name, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    span = load_span(checkpoint, 0, 2, dtype=dtype)
    prompt = torch.randn(2, 7, checkpoint.hidden_size, generator=torch.Generator().manual_seed(1)).to(dtype)
    output = span.forward(prompt, span.new_cache())
    lay_out_span(span, checkpoint.hidden_size, _all(layout))
    done = any(isinstance(module, kind) for layer in span.layers for module in layer.modules())
    assert done is (can_pack(dtype) if layout is Layout.PACKED else can_use_panels(dtype))
    tolerance = 1e-4 if dtype is torch.float32 else 5e-2
    error = (span.forward(prompt, span.new_cache()) - output).float().norm() / output.float().norm()
    assert float(error) < tolerance


def test_every_machine_packs_fp32() -> None:
    assert can_pack(torch.float32)


@pytest.mark.parametrize("in_blocks", [PackedLinear, lambda linear: PanelLinear(linear.weight, linear.bias)])
def test_gradients_pass_through_weights_in_blocks(in_blocks: Callable[[torch.nn.Linear], torch.nn.Module]) -> None:
    linear = torch.nn.Linear(32, 48).requires_grad_(False)
    rows = torch.randn(3, 32, requires_grad=True)
    (expected,) = torch.autograd.grad(linear(rows).square().sum(), rows)
    (found,) = torch.autograd.grad(in_blocks(linear)(rows).square().sum(), rows)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_head_and_the_embedding_that_is_tied_to_it_stay_what_they_were() -> None:
    embedding, head = torch.nn.Embedding(40_000, _HIDDEN_SIZE), torch.nn.Linear(_HIDDEN_SIZE, 40_000, bias=False)
    head.weight = embedding.weight
    hidden_states, ids = torch.randn(1, 3, _HIDDEN_SIZE), torch.tensor([0, 7, 39_999])
    logits, vectors, weight = head(hidden_states), embedding(ids), head.weight.clone()
    laid_out = lay_out_head(head)
    assert laid_out is not None
    assert torch.equal(head.weight, weight) and laid_out.weight is embedding.weight
    assert torch.equal(embedding(ids), vectors)
    torch.testing.assert_close(laid_out(hidden_states), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", [Layout.PACKED, Layout.PANELS])
def test_a_large_head_is_not_held_twice(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_layout, "fastest_layouts", _all(layout))
    head = torch.nn.Linear(64, 640, bias=False).requires_grad_(False)
    packed = lay_out_head(head)
    assert isinstance(packed, LinearWithCopy) and list(packed.state_dict()) == ["weight"]
    monkeypatch.setattr(weight_layout, "_MAX_SECOND_COPY_BYTES", 1)
    assert lay_out_head(head) is head


@pytest.mark.parametrize("layout", Layout)
def test_a_layout_that_would_change_results_is_given_up(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(weight_layout._TOLERANCE, torch.float32, -1.0)  # whatever the result, it is too far away
    span = _load(1)
    output = _run(span)
    with caplog.at_level(logging.WARNING):
        lay_out_span(span, _HIDDEN_SIZE, _all(layout))
    assert "not used" in caplog.text
    assert all(weight.is_contiguous() and not weight.is_mkldnn for weight in span.weights())
    assert torch.equal(_run(span), output)
