"""Hidden states come back as they were sent, or as near as their codec promises."""

from __future__ import annotations

import math

import pytest
import torch
from hosted_session import HIDDEN, Hosted, outputs, states
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.protocol.codec import CODECS, decode_hidden_states, encode_hidden_states
from swarm.protocol.messages import Output, Step

BOUND = 1 / 254
ROUNDING = 1e-5
"""Of float32, and of denormals near zero."""


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 4, 63, 64, 65, 100, 576, 2049])),
    magnitude=st.floats(1e-30, 1e30),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**32),
    outlier=st.booleans(),
    some_zeros=st.booleans(),
)
@settings(deadline=None, max_examples=300)
def test_int8_brings_every_number_back_within_a_254th_of_its_blocks_largest(
    shape: tuple[int, int, int], magnitude: float, dtype: torch.dtype, seed: int, outlier: bool, some_zeros: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    sent = torch.randn(shape, generator=generator) * magnitude
    if outlier:
        sent[..., 0] *= 1000
    if some_zeros:
        sent[..., : shape[2] // 2] = 0
    sent = sent.clamp(-6e4, 6e4).to(dtype) if dtype == torch.float16 else sent.to(dtype)
    encoded = encode_hidden_states(sent, "int8")
    assert encoded["hidden_states"].shape == sent.shape and encoded["hidden_states"].dtype == torch.int8
    received = decode_hidden_states(encoded, shape[2])
    assert received.shape == sent.shape and received.is_floating_point()
    for begin in range(0, shape[2], 64):
        block, back = sent[..., begin : begin + 64].float(), received[..., begin : begin + 64]
        largest = block.abs().amax(dim=-1, keepdim=True)
        assert ((block - back).abs() <= largest * (BOUND * (1 + ROUNDING)) + 1e-38).all()
        assert (back[block == 0] == 0).all()


@pytest.mark.parametrize("hidden", [64, 100])
def test_zeros_come_back_as_zeros(hidden: int) -> None:
    received = decode_hidden_states(encode_hidden_states(torch.zeros(2, 3, hidden), "int8"), hidden)
    assert torch.equal(received, torch.zeros(2, 3, hidden))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_block_with_a_number_that_is_none_comes_back_as_nan_and_the_others_as_they_were(bad: float) -> None:
    sent = torch.ones(1, 2, 130)
    sent[0, 1, 70] = bad
    encoded = encode_hidden_states(sent, "int8")
    assert (encoded["hidden_states"][0, 1, 64:128] == 0).all()
    received = decode_hidden_states(encoded, 130)
    assert received[0, 1, 64:128].isnan().all()
    received[0, 1, 64:128] = 1.0
    torch.testing.assert_close(received, torch.ones(1, 2, 130))


@pytest.mark.parametrize("codec", [None, *CODECS])
def test_every_codec_that_may_be_asked_for_works_and_none_is_lossless(codec: str | None) -> None:
    hosted, sent = Hosted({"codec": codec}), states(2, 3)
    hosted.send(1, 0, sent)
    (answer,) = outputs(hosted.compute())
    assert answer.tensors is not None and isinstance(answer.message, Output)
    assert answer.message.hops[0].codec == codec
    received = decode_hidden_states(answer.tensors, HIDDEN)
    torch.testing.assert_close(received.float(), sent * 2, atol=0.02 if codec else 0.0, rtol=0.0)
    other = Hosted()
    other.tell(Step(sequence=1, position=0, tensors=[]), **answer.tensors)  # as the next server gets it
    assert torch.equal(other.working[0].hidden_states, received)


def test_numbers_that_are_none_from_a_stranger_are_computed_with_and_harm_nobody() -> None:
    hosted = Hosted()
    hosted.send(1, 0, torch.zeros(2, 1, HIDDEN, dtype=torch.int8), scales=torch.full((2, 1, 1), math.nan))
    assert hosted.working[0].hidden_states.isnan().all()
    assert len(outputs(hosted.compute())) == 1
