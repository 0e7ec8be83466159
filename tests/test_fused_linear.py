"""A fused layer is its parts, side by side."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from test_quantization import linear, quantized, states
from torch import nn

from swarm.models.fused_linear import fuse
from swarm.models.quantization import SCHEMES

BIASES = [(False, False, False), (True, True, True), (False, True, False)]


def layers(biases: Sequence[bool], outputs: Sequence[int] = (96, 32, 40)) -> list[nn.Linear]:
    return [linear(72, count, bias=bias, seed=count) for count, bias in zip(outputs, biases, strict=True)]


@pytest.mark.parametrize("biases", BIASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_layers(biases: Sequence[bool], dtype: torch.dtype) -> None:
    parts, hidden = [part.to(dtype) for part in layers(biases)], states(2, 3, 72).to(dtype)
    expected = torch.cat([part(hidden) for part in parts], dim=-1)
    fused = fuse(parts)
    assert isinstance(fused, nn.Linear) and (fused.in_features, fused.out_features) == (72, 168)
    torch.testing.assert_close(fused(hidden), expected)
    torch.testing.assert_close(torch.cat([part(hidden) for part in parts], dim=-1), expected)


def test_plain_layers_become_views_of_the_fused_one() -> None:
    parts = layers((False, True, False))
    weights = [part.weight.clone() for part in parts]
    fused = fuse(parts)
    storage = fused.weight.untyped_storage().data_ptr()
    for part, weight in zip(parts, weights, strict=True):
        assert part.weight.untyped_storage().data_ptr() == storage
        assert torch.equal(part.weight, weight)


def test_plain_layers_that_were_laid_out_transposed() -> None:
    parts, hidden = layers((False, False, False)), states(3, 72)
    expected = torch.cat([part(hidden) for part in parts], dim=-1)
    for part in parts:
        part.weight.data = part.weight.data.t().contiguous().t()
    torch.testing.assert_close(fuse(parts)(hidden), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("biases", BIASES)
@pytest.mark.parametrize("rows", [1, 5, 600])
def test_quantized_layers(scheme: str, biases: Sequence[bool], rows: int) -> None:
    parts, hidden = [quantized(part, scheme) for part in layers(biases)], states(rows, 72)
    expected = torch.cat([part(hidden) for part in parts], dim=-1)
    found = fuse(parts)(hidden)
    if scheme == "int8":
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


def test_what_does_not_belong_together_is_refused() -> None:
    plain = linear(64, 32)
    with pytest.raises(ValueError, match="of different kinds"):
        fuse([plain, quantized(linear(64, 32), "int8")])
    with pytest.raises(ValueError, match="unequal inputs or precision"):
        fuse([plain, linear(128, 32)])
    with pytest.raises(ValueError, match="unequal inputs or precision"):
        fuse([plain, linear(64, 32).to(torch.bfloat16)])
    with pytest.raises(ValueError, match="LayerNorm is no layer"):
        fuse([nn.LayerNorm(8), nn.LayerNorm(8)])
