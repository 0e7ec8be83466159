"""A damaged, incomplete or foreign checkpoint is refused with a sentence that says which file and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM

from swarm.errors import CheckpointNotFound, CorruptCheckpoint, ModelError, UnsupportedFamily
from swarm.models import load_span, open_checkpoint
from swarm.models.digests import MANIFEST


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_tiny_model("llama", tmp_path)
    return tmp_path


def reshard(directory: Path) -> None:
    """Save the checkpoint again in several shards."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="60KB")


def cut_short(directory: Path) -> None:
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def spoil_header(directory: Path) -> None:
    weights = directory / "model.safetensors"
    weights.write_bytes(b"\xff" * 64 + weights.read_bytes()[64:])


def lose_a_shard(directory: Path) -> None:
    reshard(directory)
    sorted(directory.glob("model-*.safetensors"))[1].unlink()


def spoil_index(directory: Path) -> None:
    reshard(directory)
    (directory / "model.safetensors.index.json").write_text("{")


def spoil_config(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": ')


def pickle_only(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def one_block_too_many(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (cut_short, CorruptCheckpoint, "model.safetensors is damaged or cut short"),
        (spoil_header, CorruptCheckpoint, "model.safetensors is damaged or cut short"),
        (lose_a_shard, CorruptCheckpoint, "missing"),
        (spoil_index, CorruptCheckpoint, "index.json is damaged"),
        (spoil_config, ModelError, "config.json"),
        (pickle_only, CheckpointNotFound, "pickled weights"),
        (one_block_too_many, CorruptCheckpoint, "no weights for block 4 of 5"),
    ],
)
def test_damage_is_named(damage: Callable[[Path], None], error: type[ModelError], words: str, directory: Path) -> None:
    damage(directory)
    with pytest.raises(error, match=words):
        open_checkpoint(directory)


def test_a_flipped_bit_in_one_block_is_found_when_that_block_is_loaded(directory: Path) -> None:
    (directory / MANIFEST).write_text(open_checkpoint(directory).digests.to_json())
    weights = directory / "model.safetensors"
    with safe_open(weights, framework="pt") as file:
        victim = file.get_tensor("model.layers.2.mlp.up_proj.weight").numpy().tobytes()
    data = bytearray(weights.read_bytes())
    data[data.find(victim) + 5] ^= 1
    weights.write_bytes(data)
    checkpoint = open_checkpoint(directory)
    assert load_span(checkpoint, 0, 2, dtype=torch.float32).weight_bytes > 0
    with pytest.raises(CorruptCheckpoint, match="checksum of block 2"):
        load_span(checkpoint, 2, 3, dtype=torch.float32)


def test_a_missing_tensor_is_named(directory: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(directory / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptCheckpoint, match=r"lacks .*layers\.1\.mlp\.up_proj"):
        load_span(open_checkpoint(directory), 0, 2, dtype=torch.float32)


def test_the_digest_is_of_the_content_not_of_the_files(
    directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = open_checkpoint(directory).model_digest
    reshard(directory)
    assert open_checkpoint(directory).model_digest == whole
    other = tmp_path_factory.mktemp("other")
    save_tiny_model("llama", other, seed=1)
    assert open_checkpoint(other).model_digest != whole


def test_only_the_spans_own_tensors_are_read(directory: Path) -> None:
    checkpoint = open_checkpoint(directory)
    read: list[int] = []
    load_span(checkpoint, 1, 3, dtype=torch.float32, on_bytes=read.append)
    assert sum(read) == checkpoint.block_elements(1) + checkpoint.block_elements(2)


def test_names_that_lead_nowhere_say_what_was_tried(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match=r"not a directory, a \.gguf file"):
        open_checkpoint("nothing-of-that-name")
    with pytest.raises(CheckpointNotFound, match=r"no config\.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUFfff" * 10)
    with pytest.raises(CorruptCheckpoint, match="cannot be read as GGUF"):
        open_checkpoint(tmp_path / "model.gguf")


def test_a_gguf_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    whole = open_checkpoint("smollm2").location
    (tmp_path / "short.gguf").write_bytes(whole.read_bytes()[:20_000_000])
    with pytest.raises(CorruptCheckpoint, match="cut short"):
        open_checkpoint(tmp_path / "short.gguf")


def test_a_recurrent_family_is_refused_with_the_reason(tmp_path: Path) -> None:
    save_tiny_model("mamba", tmp_path)
    with pytest.raises(UnsupportedFamily, match="mamba models are not supported: they keep a recurrent state"):
        open_checkpoint(tmp_path)
