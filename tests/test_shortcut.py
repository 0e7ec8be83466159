"""Shells that do nothing but embed, normalise and multiply with the head have a short way, which leads to the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from swarm.models import EXACT_FAMILIES, load_shell, open_checkpoint
from swarm.models.shortcut import shortcut_of
from tests.tiny_models import TINY_MODELS, save_tiny_model

DO_MORE = {"gemma2", "bloom", "gpt2", "gpt2-inverse-layer-scale", "granite", "granitemoe", "cohere"}
"""Soft caps, positions that are added, embeddings that are normalised, logits that are scaled."""
TOKEN = torch.tensor([[7], [3]])


class Layers(nn.Module):
    """Stands in for a model's layers; notes how often it was called as a family calls a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.whole_ways = 0

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.calls += 1
        self.whole_ways += bool(kwargs)
        return hidden_states * 0.5 + 0.25

    def was_left_by_the_short_way(self) -> bool:
        calls, whole_ways, self.calls, self.whole_ways = self.calls, self.whole_ways, 0, 0
        assert calls == 1
        return not whole_ways


def load(name: str, directory: Path) -> tuple[PreTrainedModel, Layers]:
    save_tiny_model(name, directory)
    layers = Layers()
    return load_shell(open_checkpoint(directory), layers, dtype=torch.float32), layers


@pytest.fixture
def llama(tmp_path: Path) -> tuple[PreTrainedModel, Layers]:
    return load("llama", tmp_path)


@torch.no_grad()
def run(shell: PreTrainedModel, **options: Any) -> Any:
    return shell(**{"input_ids": TOKEN, "use_cache": False, "return_dict": True, **options})


def whole_way(shell: PreTrainedModel, **options: Any) -> Any:
    shortcut = shell.__dict__.pop("_shortcut")
    try:
        return run(shell, **options)
    finally:
        shell.__dict__["_shortcut"] = shortcut


@pytest.mark.parametrize("name", [name for name, (family, _) in TINY_MODELS.items() if family in EXACT_FAMILIES])
def test_the_short_way_is_taken_where_it_leads_to_the_same(name: str, tmp_path: Path) -> None:
    shell, layers = load(name, tmp_path)
    assert (shortcut_of(shell) is None) == (name in DO_MORE)
    positions = {} if name in DO_MORE else {"position_ids": torch.tensor([[40], [41]])}
    found = run(shell, past_key_values=None, logits_to_keep=1, **positions)
    if name not in DO_MORE:
        assert layers.was_left_by_the_short_way()
        expected = whole_way(shell, **positions)
        assert torch.equal(found.logits, expected.logits) and type(found) is type(expected)
        assert not layers.was_left_by_the_short_way()


def test_it_is_for_one_position_and_its_logits_only(llama: tuple[PreTrainedModel, Layers]) -> None:
    shell, layers = llama
    run(shell)
    assert layers.was_left_by_the_short_way()
    for more in (
        {"input_ids": torch.tensor([[1, 2]])},
        {"input_ids": None, "inputs_embeds": torch.zeros(1, 1, shell.config.hidden_size)},
        {"output_hidden_states": True},
        {"labels": TOKEN},
        {"return_dict": False},
    ):
        run(shell, **more)
        assert not layers.was_left_by_the_short_way(), more
    shell.config.output_hidden_states = True
    assert run(shell).hidden_states is not None
    assert not layers.was_left_by_the_short_way()


def test_gradients_and_hooks_go_the_whole_way(llama: tuple[PreTrainedModel, Layers]) -> None:
    shell, layers = llama
    assert shell(input_ids=TOKEN, use_cache=False).logits.shape == (2, 1, shell.config.vocab_size)
    assert not layers.was_left_by_the_short_way()
    seen: list[int] = []
    hook = shell.base_model.register_forward_hook(lambda *_: seen.append(1))
    run(shell)
    assert seen and not layers.was_left_by_the_short_way()
    hook.remove()
    run(shell)
    assert layers.was_left_by_the_short_way()


def test_what_a_user_put_in_place_of_a_part_is_used(llama: tuple[PreTrainedModel, Layers]) -> None:
    shell, layers = llama
    before = run(shell).logits
    with torch.no_grad():
        head = nn.Linear(shell.config.hidden_size, 5, bias=False)
        head.weight.copy_(2 * shell.get_output_embeddings().weight[:5])
    shell.set_output_embeddings(head)
    shell.base_model.norm = nn.Sequential(shell.base_model.norm, nn.Identity())
    assert torch.allclose(run(shell).logits, 2 * before[..., :5], atol=1e-5)
    assert layers.calls == 2 and layers.whole_ways == 0


def test_a_shell_whose_short_way_leads_elsewhere_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    original = LlamaForCausalLM.forward

    def louder(self: LlamaForCausalLM, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        output.logits = output.logits * 1.0000001
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", louder)
    shell, layers = load("llama", tmp_path)
    run(shell)
    assert shortcut_of(shell) is None and not layers.was_left_by_the_short_way()
