"""Every supported family gives, cut into spans, the logits that the whole model gives in transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tiny_models import TINY_MODELS, VOCABULARY, save_tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from swarm.models import EXACT_FAMILIES, Checkpoint, Span, SpanCache, load_shell, load_span, open_checkpoint

NOT_BIT_EQUAL: frozenset[str] = frozenset()
"""Tiny models whose logits through spans equal the local ones within 1e-4, but not in every bit."""

SUPPORTED = [name for name, (family, _) in TINY_MODELS.items() if family in EXACT_FAMILIES]
CUTS = [((0, 2), (2, 4)), ((0, 1), (1, 4)), ((0, 3), (3, 4))]
PREFILL, STEPS = 9, 6


@dataclass(frozen=True)
class Step:
    """One call of a model: ids of the new positions, and what ``generate()`` passes beside them."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
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


@pytest.fixture(scope="module", autouse=True)
def swarm_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SWARM_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


@pytest.mark.parametrize("name", SUPPORTED)
def test_logits_through_spans_equal_local(name: str, saved: Callable[[str], Path]) -> None:
    steps = unpadded_steps()
    expected = local_logits(saved(name), steps)
    assert expected[0].std() > 0.1, "a model that says nothing proves nothing"
    checkpoint = open_checkpoint(saved(name))
    for cut in CUTS:
        found = logits_through_spans(
            checkpoint, [load_span(checkpoint, *ends, dtype=torch.float32) for ends in cut], steps
        )
        for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0, msg=lambda text, n=number: f"step {n}: {text}")
        bit_equal = all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
        assert bit_equal or name in NOT_BIT_EQUAL


def unpadded_steps(batch: int = 2, prefill: int = PREFILL, steps: int = STEPS, seed: int = 0) -> list[Step]:
    """A prefill, and then one position at a time."""
    ids = torch.randint(3, VOCABULARY, (batch, prefill + steps), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(prefill + steps).expand(batch, -1)
    ends = [(0, prefill), *((at, at + 1) for at in range(prefill, prefill + steps))]
    return [Step(ids[:, start:end], positions[:, start:end]) for start, end in ends]


def local_logits(directory: Path, steps: Sequence[Step]) -> list[torch.Tensor]:
    """What transformers computes for `steps` with the whole model."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    cache = DynamicCache(config=model.config)
    return [logits_of(model, step, cache) for step in steps]


def logits_through_spans(checkpoint: Checkpoint, spans: Sequence[Span], steps: Sequence[Step]) -> list[torch.Tensor]:
    """The same, with the shell here and the layers in `spans`."""
    layers = SpansInOrder(spans)
    shell = load_shell(checkpoint, layers, dtype=torch.float32)
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
