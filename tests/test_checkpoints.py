"""A damaged, incomplete or foreign checkpoint is refused with a sentence that says which file and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SmolLM2
from gguf import GGUFWriter
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM

from swarm.errors import CheckpointNotFound, CorruptCheckpoint, ModelError, UnsupportedFamily
from swarm.models import load_shell, load_span, open_checkpoint
from swarm.models.checkpoint import block_of
from swarm.models.digests import MANIFEST, Digests
from swarm.models.local import load_whole_model


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


def spoil_index_encoding(directory: Path) -> None:
    reshard(directory)
    (directory / "model.safetensors.index.json").write_bytes(b"\xff\xfe{")


def spoil_index_shards(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": 3}}')


def lose_a_block(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    save_file({name: weights[name] for name in weights if block_of(name) != 2}, directory / "model.safetensors")


def spoil_config(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": ')


def change_config(directory: Path, **fields: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **fields}))


def write_nonsense_in_config(directory: Path) -> None:
    change_config(directory, hidden_size="sixty-four")


def write_zero_in_config(directory: Path) -> None:
    change_config(directory, num_attention_heads=0)


def pickle_only(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def one_block_too_many(directory: Path) -> None:
    change_config(directory, num_hidden_layers=5)


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (cut_short, CorruptCheckpoint, "model.safetensors is damaged or cut short"),
        (spoil_header, CorruptCheckpoint, "model.safetensors is damaged or cut short"),
        (lose_a_shard, CorruptCheckpoint, "missing"),
        (spoil_index, CorruptCheckpoint, "index.json is damaged"),
        (spoil_index_encoding, CorruptCheckpoint, "index.json is damaged"),
        (spoil_index_shards, CorruptCheckpoint, "index.json is damaged"),
        (lose_a_block, CorruptCheckpoint, "no weights for block 2 of 4"),
        (spoil_config, ModelError, "config.json"),
        (write_nonsense_in_config, CorruptCheckpoint, "config.json cannot be read"),
        (write_zero_in_config, CorruptCheckpoint, "config.json cannot be read"),
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


def test_a_flipped_bit_in_the_shell_is_found_when_the_shell_is_loaded(directory: Path) -> None:
    (directory / MANIFEST).write_text(open_checkpoint(directory).digests.to_json())
    weights = load_file(directory / "model.safetensors")
    weights["model.norm.weight"][3] += 1
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(directory)
    load_span(checkpoint, 0, 4, dtype=torch.float32)
    with pytest.raises(CorruptCheckpoint, match="checksum of the embeddings, norm and head"):
        load_shell(checkpoint, torch.nn.Identity(), dtype=torch.float32)


def test_a_damaged_manifest_is_named(directory: Path) -> None:
    for text in ("{", "[]", '{"shell": "ab"}', '{"shell": "ab", "blocks": 3}'):
        (directory / MANIFEST).write_text(text)
        with pytest.raises(CorruptCheckpoint, match=r"swarm-digests\.json is damaged"):
            load_span(open_checkpoint(directory), 0, 1, dtype=torch.float32)


@pytest.mark.parametrize("listed", [0, 3, 5])
def test_a_manifest_of_another_number_of_blocks_is_refused(listed: int, directory: Path) -> None:
    digests = open_checkpoint(directory).digests
    blocks = (*digests.blocks, digests.shell)[:listed]
    (directory / MANIFEST).write_text(Digests(digests.shell, blocks).to_json())
    for block in (0, None):
        with pytest.raises(CorruptCheckpoint, match=rf"digests\.json lists {listed} blocks, and the model has 4"):
            open_checkpoint(directory).verify(block)
    with pytest.raises(CorruptCheckpoint, match="another model"):
        _ = open_checkpoint(directory).model_digest
    (directory / MANIFEST).unlink()
    open_checkpoint(directory).verify(0)


def test_digests_remembered_for_another_number_of_blocks_are_computed_anew(directory: Path) -> None:
    """The configuration may change while the weights, for which digests are remembered, do not."""
    before = open_checkpoint(directory).digests
    change_config(directory, num_hidden_layers=3)
    after = open_checkpoint(directory)
    assert after.digests.blocks == before.blocks[:3]
    after.verify(2)


def test_a_tensor_of_the_wrong_shape_is_refused(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(5, 64)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(directory)
    load_span(checkpoint, 2, 4, dtype=torch.float32)
    with pytest.raises(CorruptCheckpoint, match="cannot be loaded"):
        load_span(checkpoint, 0, 2, dtype=torch.float32)


def test_a_missing_embedding_is_named(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    del weights["model.embed_tokens.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptCheckpoint, match=r"lacks .*embed_tokens"):
        load_shell(open_checkpoint(directory), torch.nn.Identity(), dtype=torch.float32)


def test_a_missing_tensor_is_named(directory: Path) -> None:
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
    load_span(checkpoint, 1, 3, dtype=torch.float32, on_elements=read.append)
    assert sum(read) == checkpoint.block_elements(1) + checkpoint.block_elements(2)


def test_other_blocks_shards_are_never_opened(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    shards = {name: f"block-{block_of(name)}.safetensors" for name in weights}
    for shard in set(shards.values()):
        save_file({name: weights[name] for name in weights if shards[name] == shard}, directory / shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    checkpoint = open_checkpoint(directory)
    for shard in set(shards.values()) - {"block-1.safetensors"}:
        (directory / shard).write_bytes(b"nothing that could be read")
    load_span(checkpoint, 1, 2, dtype=torch.float32)
    with pytest.raises(CorruptCheckpoint, match=r"block-2\.safetensors cannot be read"):
        load_span(checkpoint, 1, 3, dtype=torch.float32)


def test_weights_beyond_the_last_block_are_left_alone(directory: Path) -> None:
    """DeepSeek's checkpoints end with a layer for multi-token prediction, which is not one of the decoder layers."""
    before = open_checkpoint(directory)
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.4.eh_proj.weight"] = torch.ones(64, 128)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    after = open_checkpoint(directory)
    assert after.num_blocks == before.num_blocks
    assert after.digests == before.digests
    load_span(after, 0, 4, dtype=torch.float32)


def test_names_that_lead_nowhere_say_what_was_tried(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match=r"not a directory, a \.gguf file"):
        open_checkpoint("nothing-of-that-name")
    with pytest.raises(CheckpointNotFound, match=r"no config\.json"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointNotFound, match=r"not a directory, a \.gguf file"):
        open_checkpoint(tmp_path / "nowhere" / "model.gguf")
    (tmp_path / "weights.bin").touch()
    with pytest.raises(CheckpointNotFound, match=r"neither a directory nor a \.gguf file"):
        open_checkpoint(tmp_path / "weights.bin")


def test_no_name_is_not_the_current_directory(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(directory)
    assert open_checkpoint(".").num_blocks == 4
    with pytest.raises(CheckpointNotFound, match="name is empty"):
        open_checkpoint("")


@pytest.mark.parametrize(
    "name",
    ["x" * 300, f"{'x' * 200}/{'y' * 200}", f"{'x' * 300}/y", "/x" * 5000, "~nobody-of-that-name/x", "x/..", "x\0y"],
    ids=["name", "Hub id", "owner", "path", "home", "no Hub id", "zero byte"],
)
def test_a_name_that_cannot_be_one_is_refused_in_a_short_sentence(name: str) -> None:
    with pytest.raises(CheckpointNotFound, match="There is no model ") as caught:
        open_checkpoint(name)
    assert len(str(caught.value)) < 350


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUFfff" * 10, b"\x80\x04pickled" * 100, bytes(4096)])
def test_bytes_that_are_not_gguf_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(CorruptCheckpoint, match="cannot be read as GGUF"):
        open_checkpoint(tmp_path / "model.gguf")


@pytest.mark.parametrize("architecture", ["baichuan", "llama99"])
def test_a_gguf_file_of_an_unknown_family_is_refused_by_name(architecture: str, tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "model.gguf", architecture)
    writer.add_name("tiny")
    writer.add_tensor("blk.0.attn_q.weight", torch.zeros(4, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedFamily, match=rf"is not supported: .*{architecture}.*Use the model's safetensors"):
        open_checkpoint(tmp_path / "model.gguf")


def test_a_gguf_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    whole = open_checkpoint("smollm2").location
    with whole.open("rb") as file:
        start = file.read(20_000_000)
    (tmp_path / "short.gguf").write_bytes(start)
    with pytest.raises(CorruptCheckpoint, match="cut short"):
        open_checkpoint(tmp_path / "short.gguf")
    (tmp_path / "short.gguf").write_bytes(start[:100_000])
    with pytest.raises(CorruptCheckpoint, match="cannot be read as GGUF"):
        open_checkpoint(tmp_path / "short.gguf")


def test_weights_from_a_gguf_file_equal_those_that_transformers_reads(smollm2: SmolLM2) -> None:
    span = load_span(smollm2.checkpoint, 7, 9, dtype=torch.float32)
    expected = [weight for layer in smollm2.whole.model.layers[7:9] for weight in layer.parameters()]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(span.weights(), expected, strict=True))
    shell = load_shell(smollm2.checkpoint, torch.nn.Identity(), dtype=torch.float32)
    whole = dict(smollm2.whole.named_parameters())
    assert len(list(shell.parameters())) == 2, "embeddings, which are the head too, and the last norm"
    assert all(torch.equal(weight, whole[name]) for name, weight in shell.named_parameters())


def test_loading_the_whole_model_leaves_the_terminal_alone(
    directory: Path, smollm2: SmolLM2, capfd: pytest.CaptureFixture[str]
) -> None:
    load_whole_model(smollm2.checkpoint)
    load_whole_model(open_checkpoint(directory))
    assert capfd.readouterr() == ("", "")


def test_a_recurrent_family_is_refused_with_the_reason(tmp_path: Path) -> None:
    save_tiny_model("mamba", tmp_path)
    with pytest.raises(UnsupportedFamily, match="mamba models are not supported: they keep a recurrent state"):
        open_checkpoint(tmp_path)


def test_a_family_that_transformers_does_not_know_is_refused_by_name(directory: Path) -> None:
    change_config(directory, model_type="llama99", auto_map={"AutoConfig": "configuration_llama99.Config"})
    with pytest.raises(UnsupportedFamily, match="a 'llama99' model, which is not supported"):
        open_checkpoint(directory)


@pytest.mark.parametrize("family", ["", None, 7, ["llama"]], ids=repr)
def test_a_configuration_without_a_family_cannot_be_read(family: object, directory: Path) -> None:
    change_config(directory, model_type=family)
    with pytest.raises(CorruptCheckpoint, match=r"config\.json cannot be read"):
        open_checkpoint(directory)


def test_what_cannot_be_kept_on_a_full_disk_is_computed_again(
    directory: Path,
    smollm2: SmolLM2,
    full_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    digests = open_checkpoint(directory).digests
    kept = full_disk / "kept"
    monkeypatch.setenv("SWARM_HOME", str(kept))
    gguf = open_checkpoint("smollm2")
    assert gguf.config.to_diff_dict() == smollm2.checkpoint.config.to_diff_dict()
    assert gguf.tokenizer()("The sea is") == smollm2.tokenizer("The sea is")
    assert open_checkpoint(directory).digests == digests
    warnings = [record.getMessage() for record in caplog.records if record.name == "swarm.cache_directory"]
    assert len(warnings) == 3 and all("No space left" in warning for warning in warnings)
    assert [path for path in kept.rglob("*") if path.is_file() or path.name.startswith(".")] == []
    (full_disk / "filling").unlink()
    assert open_checkpoint(directory).digests == digests
    assert len(list((kept / "digests").iterdir())) == 1


def test_a_home_for_caches_that_cannot_be_made_is_a_warning(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (directory / "a-file").touch()
    monkeypatch.setenv("SWARM_HOME", str(directory / "a-file" / "home"))
    assert len(open_checkpoint(directory).digests.blocks) == 4
    assert "could not be kept" in caplog.text and "Not a directory" in caplog.text
