"""Every supported family gives, cut into spans, the logits that the whole model gives in transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from tiny_models import BLOCKS, TINY_MODELS, VOCABULARY, WINDOW, save_tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from swarm.errors import UnsupportedFamily
from swarm.models import EXACT_FAMILIES, Checkpoint, Span, SpanCache, load_shell, load_span, open_checkpoint

NOT_BIT_EQUAL: frozenset[str] = frozenset()
"""Tiny models whose logits through spans equal the local ones within 1e-4, but not in every bit."""

SUPPORTED = [name for name, (family, _) in TINY_MODELS.items() if family in EXACT_FAMILIES]
CUTS = [((0, 2), (2, 4)), ((0, 1), (1, 4)), ((0, 3), (3, 4))]
SLIDING = ["mistral", "qwen2-sliding", "gemma2", "gemma3_text", "phi3", "starcoder2", "mixtral", "gpt_oss"]
PREFILL, STEPS = 9, 6


@dataclass(frozen=True)
class Step:
    """One call of a model: ids of the new positions, and what ``generate()`` passes beside them."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor | None
    attention_mask: torch.Tensor | None = None


class SpansInOrder(nn.Module):
    """Runs hidden states through spans with their caches, in the place of a model's layers."""

    def __init__(self, spans: Sequence[Span]) -> None:
        super().__init__()
        self._spans = tuple(spans)
        self.caches: list[SpanCache] = [span.new_cache() for span in spans]
        self.step: Step | None = None

    def forward(self, hidden_states: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        assert self.step is not None
        for span, cache in zip(self._spans, self.caches, strict=True):
            hidden_states = span.forward(hidden_states, cache, self.step.position_ids, self.step.attention_mask)
        return hidden_states


class LengthOf(Cache):
    """What the shell sees as its cache: nothing but the number of positions that the spans hold."""

    def __init__(self, held: SpanCache) -> None:
        super().__init__(layers=[DynamicLayer()])
        self._held = held

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._held.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._held.length + query_length, 0


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give the directory of a tiny model, which is written once."""
    made: dict[str, Path] = {}

    def directory_of(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            save_tiny_model(name, made[name])
        return made[name]

    return directory_of


def test_every_supported_family_has_a_tiny_model() -> None:
    assert {TINY_MODELS[name][0] for name in SUPPORTED} == EXACT_FAMILIES


@pytest.mark.parametrize("name", SUPPORTED)
def test_logits_through_spans_equal_local(name: str, saved: Callable[[str], Path]) -> None:
    steps = steps_of([PREFILL, *[1] * STEPS])
    expected = local_logits(saved(name), steps)
    assert expected[0].std() > 0.1, "a model that says nothing proves nothing"
    checkpoint = open_checkpoint(saved(name))
    for cut in CUTS:
        found = logits_through_spans(checkpoint, spans_of(checkpoint, cut), steps)
        assert_logits_equal(found, expected)
        bit_equal = all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
        assert bit_equal or name in NOT_BIT_EQUAL


@pytest.mark.parametrize("name", SLIDING)
def test_chunks_that_cross_the_sliding_window_equal_local(name: str, saved: Callable[[str], Path]) -> None:
    steps = steps_of([2, WINDOW - 3, 4, 1, WINDOW + 2, 3])
    checkpoint = open_checkpoint(saved(name))
    found = logits_through_spans(checkpoint, spans_of(checkpoint, CUTS[0]), steps)
    assert_logits_equal(found, local_logits(saved(name), steps))


@pytest.mark.parametrize(
    "name", ["llama", "gemma3_text", "bloom", "gpt2", "mixtral", "falcon", "falcon-alibi", "gpt_oss"]
)
def test_a_left_padded_batch_equals_local(name: str, saved: Callable[[str], Path]) -> None:
    steps = left_padded(steps_of([PREFILL, *[1] * STEPS]), padding=3)
    checkpoint = open_checkpoint(saved(name))
    found = logits_through_spans(checkpoint, spans_of(checkpoint, CUTS[0]), steps)
    expected = local_logits(saved(name), steps)
    assert_logits_equal(
        [found[0][1:], found[0][:, 3:], *found[1:]], [expected[0][1:], expected[0][:, 3:], *expected[1:]]
    )


@pytest.mark.parametrize("name", ["llama", "phi3-longrope", "falcon", "gpt2", "gemma3_text", "smollm3", "deepseek_v3"])
def test_positions_with_gaps_equal_local(name: str, saved: Callable[[str], Path]) -> None:
    steps = [replace(step, position_ids=step.position_ids**2 // 5) for step in steps_of([PREFILL, *[1] * STEPS])]
    checkpoint = open_checkpoint(saved(name))
    found = logits_through_spans(checkpoint, spans_of(checkpoint, CUTS[0]), steps)
    assert_logits_equal(found, local_logits(saved(name), steps))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "falcon-alibi", "deepseek_v3"])
def test_positions_follow_the_cached_ones_by_default(name: str, saved: Callable[[str], Path]) -> None:
    steps = steps_of([PREFILL, *[1] * STEPS])
    checkpoint = open_checkpoint(saved(name))
    unsaid = [replace(step, position_ids=None) for step in steps]
    found = logits_through_spans(checkpoint, spans_of(checkpoint, CUTS[0]), unsaid)
    assert_logits_equal(found, local_logits(saved(name), steps))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bloom", "falcon", "gpt_oss", "deepseek_v3"])
def test_bfloat16_logits_through_spans_equal_local(name: str, saved: Callable[[str], Path]) -> None:
    steps = steps_of([PREFILL, *[1] * STEPS])
    checkpoint = open_checkpoint(saved(name))
    spans = spans_of(checkpoint, CUTS[0], torch.bfloat16)
    found = logits_through_spans(checkpoint, spans, steps)
    assert_logits_equal(found, local_logits(saved(name), steps, torch.bfloat16))


@pytest.mark.parametrize(
    "name", ["llama", "qwen2-sliding", "gemma3_text", "smollm3", "gpt2-inverse-layer-scale", "gpt_oss", "deepseek_v3"]
)
def test_parts_of_a_span_equal_local(name: str, saved: Callable[[str], Path]) -> None:
    steps = steps_of([PREFILL, *[1] * STEPS])
    checkpoint = open_checkpoint(saved(name))
    whole = load_span(checkpoint, 0, BLOCKS, dtype=torch.float32)
    middle = whole.part(1, 4)
    for parts in (
        [whole],
        [whole.part(0, 1), middle.part(1, 3), middle.part(3, 4)],
        [whole.part(0, 3), middle.part(3, 4)],
    ):
        assert_logits_equal(logits_through_spans(checkpoint, parts, steps), local_logits(saved(name), steps))
    with pytest.raises(ValueError, match="does not lie within"):
        middle.part(0, 2)


@pytest.mark.parametrize("name", ["llama", "bloom", "deepseek_v3", "mistral-full"])
def test_a_cache_that_was_rolled_back_goes_on_like_a_fresh_one(name: str, saved: Callable[[str], Path]) -> None:
    steps = steps_of([PREFILL, *[1] * STEPS])
    checkpoint = open_checkpoint(saved(name))
    layers = SpansInOrder(spans_of(checkpoint, CUTS[0]))
    shell = load_shell(checkpoint, layers, dtype=torch.float32)
    run(shell, layers, steps_of([7, 5], seed=1))
    run(shell, layers, steps[1:3])
    assert [cache.length for cache in layers.caches] == [14, 14]
    assert all(cache.roll_back(0) for cache in layers.caches)
    assert_logits_equal(run(shell, layers, steps[:4]), local_logits(saved(name), steps)[:4])
    assert all(cache.roll_back(PREFILL) for cache in layers.caches)
    assert_logits_equal(run(shell, layers, steps[1:]), local_logits(saved(name), steps)[1:])


@pytest.mark.parametrize("name", ["mistral", "gemma3_text"])
def test_a_cache_whose_window_dropped_positions_refuses_to_roll_back(name: str, saved: Callable[[str], Path]) -> None:
    steps = steps_of([WINDOW - 1, *[1] * STEPS])
    checkpoint = open_checkpoint(saved(name))
    layers = SpansInOrder(spans_of(checkpoint, CUTS[0]))
    shell = load_shell(checkpoint, layers, dtype=torch.float32)
    expected = local_logits(saved(name), steps)
    run(shell, layers, steps_of([WINDOW - 1], seed=1))
    assert all(cache.roll_back(0) for cache in layers.caches), "the window has not dropped anything yet"
    assert_logits_equal(run(shell, layers, steps[:2]), expected[:2])
    assert not any(cache.roll_back(WINDOW - 1) for cache in layers.caches)
    assert all(cache.roll_back(WINDOW) for cache in layers.caches), "nothing to forget"
    assert_logits_equal(run(shell, layers, steps[2:]), expected[2:])


def test_sessions_on_one_span_do_not_see_each_other(saved: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(saved("gemma3_text"))
    spans = spans_of(checkpoint, CUTS[0])
    runs = [(SpansInOrder(spans), steps_of([PREFILL, *[1] * STEPS], batch=batch, seed=batch)) for batch in (1, 3)]
    shells = [load_shell(checkpoint, layers, dtype=torch.float32) for layers, _ in runs]
    found: list[list[torch.Tensor]] = [[], []]
    for number in range(1 + STEPS):
        for (layers, steps), shell, logits in zip(runs, shells, found, strict=True):
            logits += run(shell, layers, [steps[number]])
    for (_, steps), logits in zip(runs, found, strict=True):
        assert_logits_equal(logits, local_logits(saved("gemma3_text"), steps))


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_span_reads_each_of_its_weights_once_and_no_others(name: str, saved: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(saved(name))
    in_blocks = [checkpoint.block_elements(block) for block in range(BLOCKS)]
    read: list[int] = []
    load_span(checkpoint, 1, 3, dtype=torch.float32, on_elements=read.append)
    assert sum(read) == in_blocks[1] + in_blocks[2]
    read.clear()
    load_shell(checkpoint, nn.Identity(), dtype=torch.float32, on_elements=read.append)
    assert sum(read) == sum(entry.elements for entry in checkpoint.files.entries.values()) - sum(in_blocks)


def test_a_family_that_no_test_covers_is_refused_unless_asked_for(saved: Callable[[str], Path]) -> None:
    with pytest.raises(UnsupportedFamily, match=r"olmo models are not supported: no test has shown .*allow_untested"):
        open_checkpoint(saved("olmo"))
    checkpoint = open_checkpoint(saved("olmo"), allow_untested=True)
    steps = steps_of([PREFILL, 1])
    found = logits_through_spans(checkpoint, spans_of(checkpoint, CUTS[0]), steps)
    assert_logits_equal(found, local_logits(saved("olmo"), steps))


def test_a_recurrent_family_is_refused_even_when_asked_for(saved: Callable[[str], Path]) -> None:
    with pytest.raises(UnsupportedFamily, match="mamba models are not supported: they keep a recurrent state"):
        open_checkpoint(saved("mamba"), allow_untested=True)


def assert_logits_equal(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0, msg=lambda text, n=number: f"step {n}: {text}")


def steps_of(lengths: Sequence[int], batch: int = 2, seed: int = 0) -> list[Step]:
    """Steps of so many new positions each, with random ids."""
    total = sum(lengths)
    ids = torch.randint(3, VOCABULARY, (batch, total), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(total).expand(batch, -1)
    return [
        Step(some_ids, some_positions)
        for some_ids, some_positions in zip(ids.split(list(lengths), 1), positions.split(list(lengths), 1), strict=True)
    ]


def left_padded(steps: Sequence[Step], padding: int) -> list[Step]:
    """The same with the first positions of the first row masked, as ``generate()`` passes it."""
    ids = torch.cat([step.input_ids for step in steps], dim=1)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    ends = torch.tensor([step.input_ids.shape[1] for step in steps]).cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    return [
        Step(ids[:, start:end], positions[:, start:end], mask[:, :end]) for start, end in zip(starts, ends, strict=True)
    ]


def spans_of(checkpoint: Checkpoint, cut: Sequence[tuple[int, int]], dtype: torch.dtype = torch.float32) -> list[Span]:
    return [load_span(checkpoint, start, end, dtype=dtype) for start, end in cut]


def local_logits(directory: Path, steps: Sequence[Step], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """What transformers computes for `steps` with the whole model."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    cache = DynamicCache(config=model.config)
    return [logits_of(model, step, cache) for step in steps]


def logits_through_spans(checkpoint: Checkpoint, spans: Sequence[Span], steps: Sequence[Step]) -> list[torch.Tensor]:
    """The same, with the shell here and the layers in `spans`."""
    layers = SpansInOrder(spans)
    return run(load_shell(checkpoint, layers, dtype=spans[0].dtype), layers, steps)


def run(shell: PreTrainedModel, layers: SpansInOrder, steps: Sequence[Step]) -> list[torch.Tensor]:
    """The logits of `steps`, which go on with what the caches of `layers` hold."""
    cache = LengthOf(layers.caches[0])
    found = []
    for step in steps:
        layers.step = step
        found.append(logits_of(shell, step, cache))
    return found


@torch.inference_mode()
def logits_of(model: PreTrainedModel, step: Step, cache: Cache) -> torch.Tensor:
    output = model(
        input_ids=step.input_ids,
        position_ids=step.position_ids,
        attention_mask=step.attention_mask,
        past_key_values=cache,
        use_cache=True,
    )
    logits: torch.Tensor = output.logits
    return logits
