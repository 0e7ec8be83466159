"""A span that is made of layers in memory and others read anew computes what one read anew would."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny_model

from swarm.models import Span, load_span, open_checkpoint
from swarm.models.paged_cache import PagePool
from swarm.models.together import prepare_span

HIDDEN = 64
MUCH = 2**30


def output(span: Span) -> torch.Tensor:
    states = torch.randn(1, 5, HIDDEN, generator=torch.Generator().manual_seed(1))
    return span.forward(states, span.new_cache())


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt2", "bloom", "qwen3_moe", "deepseek_v3"])
def test_reused_layers_compute_the_same(family: str, tmp_path: Path) -> None:
    save_tiny_model(family, tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    before = load_span(checkpoint, 0, 3, dtype=torch.float32)
    prepare_span(before, HIDDEN)
    read = 0

    def count(elements: int) -> None:
        nonlocal read
        read += elements

    span = load_span(checkpoint, 1, 4, dtype=torch.float32, reuse=before.take_out(1, 4, MUCH), on_elements=count)
    assert read == checkpoint.block_elements(3)
    del before
    together = prepare_span(span, HIDDEN)
    anew = load_span(checkpoint, 1, 4, dtype=torch.float32)
    together_anew = prepare_span(anew, HIDDEN)
    assert type(together) is type(together_anew)
    torch.testing.assert_close(output(span), output(anew), rtol=1e-5, atol=1e-5)
    if together is not None and together_anew is not None:
        states = torch.randn(1, 1, HIDDEN, generator=torch.Generator().manual_seed(2))
        results = [
            way.forward(one, [(states, PagePool.for_span(one, HIDDEN, 2).new_cache(1, 4, 8), None)])[0]
            for way, one in ((together, span), (together_anew, anew))
        ]
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_quantized_layers_are_reused_as_they_are(tiny: str) -> None:
    checkpoint = open_checkpoint(tiny)
    before = load_span(checkpoint, 0, 3, dtype=torch.float32, quantization="int8")
    prepare_span(before, HIDDEN)
    reuse = before.take_out(1, 4, MUCH)
    span = load_span(checkpoint, 1, 4, dtype=torch.float32, quantization="int8", reuse=reuse)
    prepare_span(span, HIDDEN)
    anew = load_span(checkpoint, 1, 4, dtype=torch.float32, quantization="int8")
    prepare_span(anew, HIDDEN)
    torch.testing.assert_close(output(span), output(anew), rtol=1e-5, atol=1e-5)


def test_what_is_not_taken_out_is_freed(tiny: str) -> None:
    span = load_span(open_checkpoint(tiny), 0, 3, dtype=torch.float32)
    prepare_span(span, HIDDEN)
    arenas = {weight.untyped_storage().data_ptr() for weight in span.weights()}
    layers = [weakref.ref(layer) for layer in span.layers]
    kept = span.take_out(2, 4, MUCH)
    own = {weight.untyped_storage().data_ptr() for weight in kept[2].parameters()}
    assert list(kept) == [2]
    assert not own & arenas
    del span
    gc.collect()
    assert [layer() is None for layer in layers] == [True, True, False]


def test_no_more_is_taken_out_than_there_is_room_for(tiny: str) -> None:
    span = load_span(open_checkpoint(tiny), 0, 3, dtype=torch.float32)
    of_one = sum(weight.numel() * weight.element_size() for weight in span.part(0, 1).weights())
    assert list(span.take_out(0, 4, 2 * of_one)) == [0, 1]
    assert span.take_out(0, 4, of_one - 1) == {}
    assert span.take_out(3, 4, MUCH) == {}


def test_at_least_one_block_is_read(tiny: str) -> None:
    checkpoint = open_checkpoint(tiny)
    span = load_span(checkpoint, 0, 3, dtype=torch.float32)
    with pytest.raises(ValueError, match="reused"):
        load_span(checkpoint, 0, 2, dtype=torch.float32, reuse=span.take_out(0, 2, MUCH))
