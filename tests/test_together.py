"""Sessions that run as one batch get what each would get alone, in every family whose attention allows it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_families import SUPPORTED
from tiny_models import save_tiny_model

from swarm.models import Span, load_span, open_checkpoint
from swarm.models.together import Together, way_together

ONE_BY_ONE = {"bloom", "falcon", "falcon-alibi", "falcon-new-decoder", "phi3-longrope"}
"""Their attention does not pass through transformers' interface, or a long sequence would change others' rotations."""
PADDED = {"deepseek_v3"}
"""Their layers make keys and values of what is in the cache."""
LENGTHS, ROWS, STEPS = (3, 9, 1, 14), (1, 2, 1, 3), 8


def span_of(name: str, directory: Path) -> tuple[Span, int]:
    save_tiny_model(name, directory)
    checkpoint = open_checkpoint(directory)
    return load_span(checkpoint, 1, 4, dtype=torch.float32), checkpoint.hidden_size


def states(rows: int, positions: int, hidden: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, positions, hidden, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SUPPORTED)
def test_together_is_as_alone(name: str, tmp_path: Path) -> None:
    span, hidden = span_of(name, tmp_path)
    way = way_together(span, hidden)
    assert way == (None if name in ONE_BY_ONE else Together(padded=name in PADDED))
    if way is None:
        return
    alone = [span.new_cache() for _ in LENGTHS]
    together = [span.new_cache() for _ in LENGTHS]
    for cache, other, length, rows in zip(alone, together, LENGTHS, ROWS, strict=True):
        prompt = states(rows, length, hidden, seed=length)
        span.forward(prompt, cache)
        span.forward(prompt, other)
    for step in range(STEPS):  # crosses every sliding window
        tokens = [states(rows, 1, hidden, seed=100 * step + rows) for rows in ROWS]
        expected = [span.forward(token, cache) for token, cache in zip(tokens, alone, strict=True)]
        found = way.forward(span, [(token, cache, None) for token, cache in zip(tokens, together, strict=True)])
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert [cache.length for cache in together] == [length + STEPS for length in LENGTHS]


def test_positions_that_the_client_gives_are_used(tmp_path: Path) -> None:
    span, hidden = span_of("llama", tmp_path)
    caches = [[span.new_cache() for _ in range(2)] for _ in range(2)]
    for pair in caches:
        for cache in pair:
            span.forward(states(1, 4, hidden, seed=1), cache)
    token, ids = states(1, 1, hidden, seed=2), torch.tensor([[11]])
    expected = [span.forward(token, caches[0][0], ids), span.forward(token, caches[0][1])]
    found = Together(padded=False).forward(span, [(token, caches[1][0], ids), (token, caches[1][1], None)])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found[0], found[1], atol=1e-4)


def test_a_span_runs_alone_again_afterwards(tmp_path: Path) -> None:
    span, hidden = span_of("gpt_oss", tmp_path)
    prompt, token = states(1, 5, hidden, seed=1), states(1, 1, hidden, seed=2)
    before = span.forward(prompt, span.new_cache())
    caches = [span.new_cache(), span.new_cache()]
    for cache in caches:
        span.forward(prompt, cache)
    way = Together(padded=False)
    way.forward(span, [(token, cache, None) for cache in caches])
    with pytest.raises(RuntimeError):
        way.forward(span, [(token[..., :-1], cache, None) for cache in caches])
    assert torch.equal(span.forward(prompt, span.new_cache()), before)
