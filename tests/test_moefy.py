"""A dense model cut into experts gives the dense model's answers, and is an ordinary Mixtral checkpoint."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUESTION, SmolLM2
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_models import BLOCKS, VOCABULARY, save_tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralForCausalLM

from swarm.commands import moefy as moefy_command
from swarm.commands.output import Output, run_command
from swarm.errors import DiskError, SwarmError, UnsupportedFamily
from swarm.models import Checkpoint, load_span, open_checkpoint
from swarm.models.loading import quiet_transformers
from swarm.models.local import load_whole_model
from swarm.models.moefy import mixtral_block, moefy

IDS = torch.arange(2 * 20).reshape(2, 20) % VOCABULARY
TOKENS = 24


def files_under(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.rglob("*"))


@pytest.mark.parametrize("name", ["llama", "llama-yarn", "mistral", "mistral-full"])
@torch.inference_mode()
def test_the_logits_and_tokens_are_the_dense_models(name: str, tmp_path: Path) -> None:
    save_tiny_model(name, tmp_path / "dense")
    moefy(open_checkpoint(tmp_path / "dense"), tmp_path / "experts", 8)
    dense = load_whole_model(open_checkpoint(tmp_path / "dense"))
    experts = load_whole_model(open_checkpoint(tmp_path / "experts"))
    assert isinstance(experts, MixtralForCausalLM)
    assert experts.config.num_local_experts == experts.config.num_experts_per_tok == 8
    torch.testing.assert_close(experts(IDS).logits, dense(IDS).logits, atol=1e-5, rtol=1e-5)
    greedy: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
    assert torch.equal(experts.generate(IDS, **greedy), dense.generate(IDS, **greedy))


@settings(max_examples=50, deadline=None)
@given(
    hidden=st.integers(1, 5),
    width=st.integers(1, 4),
    experts=st.sampled_from([2, 4, 8, 16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_experts_put_together_are_the_dense_network_bit_by_bit(
    hidden: int, width: int, experts: int, dtype: torch.dtype
) -> None:
    gate, up = torch.randn(2, experts * width, hidden).to(dtype)
    down, norm = torch.randn(hidden, experts * width).to(dtype), torch.randn(hidden).to(dtype)
    dense = {
        "mlp.gate_proj.weight": gate, "mlp.up_proj.weight": up, "mlp.down_proj.weight": down,
        "input_layernorm.weight": norm,
    }  # fmt: skip
    router = torch.zeros(experts, hidden).to(dtype)
    block = mixtral_block(dense, router)

    def slices(kind: str) -> list[torch.Tensor]:
        return [block.pop(f"block_sparse_moe.experts.{expert}.{kind}.weight") for expert in range(experts)]

    assert torch.equal(torch.cat(slices("w1")), gate)
    assert torch.equal(torch.cat(slices("w3")), up)
    assert torch.equal(torch.cat(slices("w2"), dim=1) / experts, down)
    assert block == {"block_sparse_moe.gate.weight": router, "input_layernorm.weight": norm}


@pytest.fixture(scope="module")
def smollm2_experts(smollm2: SmolLM2, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    """SmolLM2 with eight experts in every block."""
    directory = tmp_path_factory.mktemp("moefy") / "smollm2-experts"
    moefy(smollm2.checkpoint, directory, 8)
    yield open_checkpoint(directory)
    shutil.rmtree(directory)  # half a gigabyte


def test_smollm2_as_experts_gives_the_same_tokens(smollm2: SmolLM2, smollm2_experts: Checkpoint) -> None:
    experts = load_whole_model(smollm2_experts)
    ids = experts.generate(**smollm2.chat(QUESTION), do_sample=False, max_new_tokens=TOKENS, min_new_tokens=TOKENS)
    assert torch.equal(ids, smollm2.greedy(QUESTION, TOKENS))


def test_smollm2_as_experts_brings_its_tokenizer_and_chat_template(
    smollm2: SmolLM2, smollm2_experts: Checkpoint
) -> None:
    assert smollm2_experts.config.tie_word_embeddings
    tokenizer = smollm2_experts.tokenizer()
    messages = [{"role": "user", "content": QUESTION}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == smollm2.tokenizer.apply_chat_template(
        messages, tokenize=False
    )
    assert tokenizer(QUESTION) == smollm2.tokenizer(QUESTION)


@torch.inference_mode()
def test_a_span_of_smollm2_as_experts_computes_what_the_dense_span_does(
    smollm2: SmolLM2, smollm2_experts: Checkpoint
) -> None:
    hidden_states = torch.randn(1, 7, smollm2.checkpoint.hidden_size, generator=torch.Generator().manual_seed(0))
    dense, experts = (
        load_span(checkpoint, 10, 13, dtype=torch.float32) for checkpoint in (smollm2.checkpoint, smollm2_experts)
    )
    expected = dense.forward(hidden_states, dense.new_cache())
    found = experts.forward(hidden_states, experts.new_cache())
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_files_are_those_that_transformers_saves(tiny: str, tmp_path: Path) -> None:
    moefy(open_checkpoint(tiny), tmp_path / "experts", 4)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "experts", output_loading_info=True)
    assert not any(report.values())
    model.save_pretrained(tmp_path / "again")
    saved = load_file(tmp_path / "again" / "model.safetensors")
    written = {
        name: tensor
        for shard in (tmp_path / "experts").glob("*.safetensors")
        for name, tensor in load_file(shard).items()
    }
    assert written.keys() == saved.keys()
    assert all(torch.equal(written[name], saved[name]) for name in saved)
    assert f"model.layers.{BLOCKS - 1}.block_sparse_moe.experts.3.w2.weight" in written
    config, config_again = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("experts", "again"))
    assert config == config_again


@torch.inference_mode()
def test_with_a_seed_tokens_choose_different_experts_of_nearly_equal_weight(tiny: str, tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        moefy(open_checkpoint(tiny), tmp_path / name, 4, top_k=2, seed=seed)
    one, again, two = (load_file(max((tmp_path / name).glob("*.safetensors"))) for name in ("one", "again", "two"))
    router = "model.layers.2.block_sparse_moe.gate.weight"
    assert torch.equal(one[router], again[router]) and not torch.equal(one[router], two[router])
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    _, weights, chosen = model.model.layers[2].mlp.gate(torch.randn(200, 64))
    assert set(chosen.flatten().tolist()) == {0, 1, 2, 3}
    torch.testing.assert_close(weights, torch.full_like(weights, 0.5), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"experts": 6}, "must be a power of two .* and 6 is not"),
        ({"experts": 1}, "must be a power of two"),
        ({"experts": 0}, "must be a power of two"),
        ({"experts": 64}, "96 is not divisible by 64. The largest that fits is 32"),
        ({"experts": 4, "top_k": 5}, "from 1 to the number of experts, 4, and not 5"),
        ({"experts": 4, "top_k": 0}, "from 1 to the number of experts"),
    ],
    ids=str,
)
def test_numbers_of_experts_that_would_not_be_exact_are_refused(
    options: dict[str, int], words: str, tiny: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        moefy(open_checkpoint(tiny), tmp_path / "experts", **options)
    assert files_under(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("qwen2", "qwen2 models cannot be turned into experts: only those of the families llama and mistral can"),
        ("mixtral", "mixtral models cannot be turned into experts"),
        ("llama-tied", r"has biases \(attention_bias\)"),
    ],
)
def test_models_that_are_not_like_llama_are_refused(name: str, words: str, tmp_path: Path) -> None:
    save_tiny_model(name, tmp_path / "dense")
    with pytest.raises(UnsupportedFamily, match=words):
        moefy(open_checkpoint(tmp_path / "dense"), tmp_path / "experts", 4)
    assert not (tmp_path / "experts").exists()


def test_weights_too_large_for_their_precision_are_refused(tmp_path: Path) -> None:
    dense = {f"mlp.{name}_proj.weight": torch.full((4, 4), 30000.0, dtype=torch.float16) for name in ("gate", "up")}
    with pytest.raises(ValueError, match=r"too large for torch\.float16"):
        mixtral_block({**dense, "mlp.down_proj.weight": dense["mlp.up_proj.weight"]}, torch.zeros(4, 4))


def test_a_directory_in_use_is_refused_unless_forced_and_then_only_the_checkpoint_is_replaced(
    tiny: str, tmp_path: Path
) -> None:
    dense = open_checkpoint(tiny)
    save_tiny_model("qwen2", tmp_path)
    (tmp_path / "generation_config.json").write_text("{}")
    (tmp_path / "swarm-digests.json").write_text("of other weights")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty: choose another directory, or pass --force"):
        moefy(dense, tmp_path, 4)
    assert (tmp_path / "model.safetensors").exists()
    moefy(dense, tmp_path, 4, overwrite=True)
    assert len(open_checkpoint(tmp_path).digests.blocks) == BLOCKS
    assert files_under(tmp_path) == [
        "config.json", "generation_config.json", "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors", "model.safetensors.index.json", "notes.txt",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="is the model itself"):
        moefy(dense, Path(tiny), 4, overwrite=True)
    with pytest.raises(ValueError, match=r"notes\.txt is not a directory"):
        moefy(dense, tmp_path / "notes.txt", 4)


def test_a_full_disk_is_said_before_anything_is_written(tiny: str, full_disk: Path) -> None:
    with pytest.raises(DiskError, match=r"weights need 0\.\d MiB in .*experts, where only 0\.0 MiB are free"):
        moefy(open_checkpoint(tiny), full_disk / "new" / "experts", 4)
    assert files_under(full_disk) == ["filling"]


def test_a_disk_that_fills_meanwhile_is_a_clear_error_and_nothing_is_left(full_disk: Path, tmp_path: Path) -> None:
    shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2)).save_pretrained(tmp_path / "dense")
    (full_disk / "filling").unlink()

    def others_fill_it(_: int) -> None:
        with pytest.raises(OSError, match="No space left"), (full_disk / "filling").open("ab", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    with pytest.raises(DiskError, match=r"cannot be written to .*experts: .*No space left on device.* Make room"):
        moefy(open_checkpoint(tmp_path / "dense"), full_disk / "experts", 4, on_elements=others_fill_it)
    assert files_under(full_disk) == ["filling"]


def test_what_cannot_be_read_leaves_nothing_either(tiny: str, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "dense")
    checkpoint = open_checkpoint(tmp_path / "dense")
    assert checkpoint.digests  # from here on, whatever changes is damage
    weights = tmp_path / "dense" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(SwarmError, match="is damaged: the checksum of"):
        moefy(checkpoint, tmp_path / "experts", 4)
    assert not (tmp_path / "experts").exists()


def test_the_command_ends_with_one_object_and_the_next_attempt_with_one_error(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    moefy_command.add_arguments(parser)
    options = parser.parse_args([tiny, str(tmp_path), "--experts", "4"])
    output = Output(json=True)
    assert run_command(lambda: moefy_command.run(options, output), output) == 0
    said = capsys.readouterr()
    assert "with 4 experts in each of 4 blocks" in said.err
    facts = json.loads(said.out)
    assert (facts["experts"], facts["top_k"], facts["blocks"], facts["dtype"]) == (4, 4, BLOCKS, "float32")
    assert facts["size_bytes"] == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert run_command(lambda: moefy_command.run(options, output), output) == 1
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and "is not empty" in said.err
    assert json.loads(said.out)["event"] == "error"
