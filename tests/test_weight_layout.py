"""Weights in huge pages and in another order are the same weights."""

import logging

import pytest
import torch

from swarm.models import Span, load_span, open_checkpoint, weight_layout
from swarm.models.weight_layout import lay_out_head, lay_out_span

_HIDDEN_SIZE = 576


def _load(blocks: int) -> Span:
    return load_span(open_checkpoint("smollm2"), 0, blocks, dtype=torch.float32)


def _run(span: Span) -> torch.Tensor:
    cache = span.new_cache()
    prompt = torch.randn(2, 7, _HIDDEN_SIZE, generator=torch.Generator().manual_seed(1))
    return torch.cat([span.forward(prompt, cache), span.forward(prompt[:, :1], cache)], dim=1)


def test_the_layout_changes_neither_weights_nor_results() -> None:
    span = _load(5)  # large enough to be timed
    assert span.weight_bytes >= weight_layout._SAMPLE_BYTES
    weights, output = [weight.clone() for weight in span.weights()], _run(span)
    lay_out_span(span, _HIDDEN_SIZE)
    assert all(torch.equal(before, now) for before, now in zip(weights, span.weights(), strict=True))
    torch.testing.assert_close(_run(span), output, rtol=1e-4, atol=1e-4)


def test_transposed_weights_are_the_same_weights() -> None:
    span = _load(1)
    weights, output = [weight.clone() for weight in span.weights()], _run(span)
    shapes = {linear.weight.shape for linear in span.linears()}
    weight_layout._lay_in_huge_pages(list(span.weights()), shapes)
    assert not any(linear.weight.is_contiguous() for linear in span.linears())
    assert all(torch.equal(before, now) for before, now in zip(weights, span.weights(), strict=True))
    torch.testing.assert_close(_run(span), output, rtol=1e-4, atol=1e-4)


def test_a_head_and_the_embedding_that_is_tied_to_it_stay_what_they_were() -> None:
    embedding, head = torch.nn.Embedding(40_000, _HIDDEN_SIZE), torch.nn.Linear(_HIDDEN_SIZE, 40_000, bias=False)
    head.weight = embedding.weight
    hidden_states, ids = torch.randn(1, 3, _HIDDEN_SIZE), torch.tensor([0, 7, 39_999])
    logits, vectors, weight = head(hidden_states), embedding(ids), head.weight.clone()
    lay_out_head(head)
    assert torch.equal(head.weight, weight) and head.weight is embedding.weight
    assert torch.equal(embedding(ids), vectors)
    torch.testing.assert_close(head(hidden_states), logits, rtol=1e-4, atol=1e-4)


def test_a_layout_that_would_change_results_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(weight_layout._TOLERANCE, torch.float32, -1.0)  # whatever the result, it is too far away
    span = _load(1)
    output = _run(span)
    with caplog.at_level(logging.WARNING):
        lay_out_span(span, _HIDDEN_SIZE)
    assert "not used" in caplog.text
    assert all(linear.weight.is_contiguous() for linear in span.linears())
    assert torch.equal(_run(span), output)
