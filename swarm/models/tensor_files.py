"""Read single tensors out of safetensors shards or a GGUF file, without loading the rest.

Both readers are lazy (memory maps) and never unpickle anything. :class:`SafetensorsFiles` and
:class:`GgufFile` have the same four members, named by the :class:`TensorFiles` protocol.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.integrations.gguf.dequant import dequantize
from transformers.integrations.gguf.reader import GgufHeader, LazyGgufTensor, load_gguf_state_dict
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

from swarm.errors import CheckpointNotFound, CorruptCheckpoint, UnsupportedFamily


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as it lies on disk."""

    name: str
    shape: tuple[int, ...]
    stored_as: str
    """The name of the dtype (or of the GGUF block type) on disk."""
    size_bytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


class TensorFiles(Protocol):
    """A checkpoint's tensors, by their names on disk."""

    entries: Mapping[str, TensorEntry]
    paths: tuple[Path, ...]

    def lazy_state_dict(self, names: Collection[str], model: PreTrainedModel) -> dict[str, Any]:
        """Values that transformers' loader materialises one by one, for a `model` on the meta device."""

    def raw(self, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The bytes of one tensor as they lie on disk."""

    def release(self) -> None:
        """Unmap the files, whose pages would count as this process's memory; the next read maps them again."""


class SafetensorsFiles:
    """Tensors in safetensors shards; a shard is opened (from the Hub: downloaded) when one of its tensors is read."""

    def __init__(self, shards: Mapping[str, list[TensorEntry]], fetch: Callable[[str], Path], local: bool) -> None:
        self._fetch = fetch
        self._open: dict[str, Any] = {}
        self._file_of = {entry.name: shard for shard, entries in shards.items() for entry in entries}
        self.entries = {entry.name: entry for entries in shards.values() for entry in entries}
        self.paths = tuple(fetch(shard) for shard in shards) if local else ()

    @classmethod
    def from_directory(cls, directory: Path) -> SafetensorsFiles:
        """``model.safetensors``, or the shards that ``model.safetensors.index.json`` lists.

        Raises:
            CheckpointNotFound: no such files in `directory`.
            CorruptCheckpoint: a shard is missing, cut short, or has a damaged header.
        """
        shards = {shard: _read_header(directory / shard) for shard in _shards(directory)}
        return cls(shards, lambda shard: directory / shard, local=True)

    @classmethod
    def from_hub(cls, repository: str, commit: str) -> SafetensorsFiles:
        """A Hub repository's shards: only their headers are read now (by range requests)."""
        from huggingface_hub import get_safetensors_metadata, hf_hub_download

        metadata = get_safetensors_metadata(repository, revision=commit)
        shards = {
            shard: [
                TensorEntry(name, tuple(info.shape), info.dtype, info.data_offsets[1] - info.data_offsets[0])
                for name, info in file.tensors.items()
            ]
            for shard, file in metadata.files_metadata.items()
        }
        return cls(shards, lambda shard: Path(hf_hub_download(repository, shard, revision=commit)), local=False)

    def lazy_state_dict(self, names: Collection[str], model: PreTrainedModel) -> dict[str, Any]:
        return {name: self._handle(name).get_slice(name) for name in names}

    def raw(self, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        tensor = self._handle(name).get_tensor(name)
        bytes_: np.ndarray[Any, np.dtype[np.uint8]] = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        return bytes_

    def release(self) -> None:
        self._open.clear()

    def _handle(self, name: str) -> Any:
        shard = self._file_of[name]
        if shard not in self._open:
            path = self._fetch(shard)
            try:
                self._open[shard] = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise CorruptCheckpoint(f"{path} cannot be read: {error}. Download the file again.") from error
        return self._open[shard]


class GgufFile:
    """A GGUF file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md); weights are dequantized on reading.

    Raises:
        CorruptCheckpoint: the file is cut short, or is not GGUF.
    """

    def __init__(self, path: Path) -> None:
        self.paths = (path,)
        try:
            self._header = header = GgufHeader.from_file(str(path))
            self._open: dict[str, LazyGgufTensor] | None = load_gguf_state_dict(header)
        except (ValueError, IndexError, KeyError, OverflowError, OSError, struct.error) as error:
            raise CorruptCheckpoint(f"{path} cannot be read as GGUF: {error}. Download the file again.") from error
        self._architecture = header.architecture
        if header.architecture not in _GGUF_ARCHITECTURES or any("_exps." in name for name in self._tensors):
            raise UnsupportedFamily(
                f"{path} is not supported: Swarm reads GGUF files of dense models that gguf-py knows, and this is "
                f"{header.architecture}{' with experts' if '_exps.' in ''.join(self._tensors) else ''}. "
                "Use the model's safetensors."
            )
        self.entries = {
            info.name: TensorEntry(info.name, tuple(info.shape), f"ggml-{info.ggml_type}", info.nbytes)
            for info in header.tensors
        }
        for name, entry in self.entries.items():
            if self._tensors[name].data.nbytes != entry.size_bytes:
                raise CorruptCheckpoint(f"{path} is cut short: {name} is incomplete. Download the file again.")

    def lazy_state_dict(self, names: Collection[str], model: PreTrainedModel) -> dict[str, Any]:
        processor = TENSOR_PROCESSORS.get(self._architecture, TensorProcessor)(config=model.config.to_dict())
        hf_names = self._names_in(model)
        return {
            hf_names[name]: _DequantizedOnRead(self._tensors[name], name, processor, self.entries[name].shape)
            for name in names
            if name in hf_names
        }

    def release(self) -> None:
        self._open = None

    @property
    def _tensors(self) -> dict[str, LazyGgufTensor]:
        if self._open is None:
            self._open = load_gguf_state_dict(self._header)
        return self._open

    def _names_in(self, model: PreTrainedModel) -> dict[str, str]:
        """GGUF name → name in `model`, for every weight that `model` has."""
        names = get_tensor_name_map(_GGUF_ARCHITECTURES[self._architecture], model.config.num_hidden_layers)
        found = {}
        for hf_name in model.state_dict():
            for variant in (hf_name, hf_name.removeprefix(f"{model.base_model_prefix}.")):
                gguf_name = names.get_name(variant, try_suffixes=(".weight", ".bias"))
                if gguf_name is not None:
                    found[gguf_name] = hf_name
                    break
        return found

    def raw(self, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        bytes_: np.ndarray[Any, np.dtype[np.uint8]] = self._tensors[name].data
        return bytes_


_GGUF_ARCHITECTURES = {name: architecture for architecture, name in MODEL_ARCH_NAMES.items()}


class _DequantizedOnRead:
    """A tensor that becomes float32 when the loader indexes it, and takes no memory before."""

    def __init__(self, stored: LazyGgufTensor, name: str, processor: TensorProcessor, shape: tuple[int, ...]) -> None:
        self._stored, self._name, self._processor, self._shape = stored, name, processor, shape

    def __getitem__(self, index: object) -> torch.Tensor:
        blocks = self._stored[...]
        if blocks.dtype == torch.uint8:
            blocks = dequantize(blocks, self._stored.ggml_type, torch.float32)
        weights = blocks.to(torch.float32).reshape(self._shape).numpy()
        converted = self._processor.process(weights=weights, name=self._name).weights
        return torch.from_numpy(np.ascontiguousarray(converted))


_SAFETENSORS_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "I64": 64, "I32": 32, "I16": 16,
    "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip


def _shards(directory: Path) -> list[str]:
    index = directory / "model.safetensors.index.json"
    if index.exists():
        try:
            shards = sorted(map(os.fspath, set(json.loads(index.read_text())["weight_map"].values())))
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # also bytes that are not UTF-8
            raise CorruptCheckpoint(f"{index} is damaged: {error!r}. Download the file again.") from error
        missing = [shard for shard in shards if not (directory / shard).exists()]
        if missing:
            raise CorruptCheckpoint(
                f"{directory} is incomplete: {index.name} lists {', '.join(missing)}, which "
                f"{'is' if len(missing) == 1 else 'are'} missing. Download the checkpoint again."
            )
        return shards
    if (directory / "model.safetensors").exists():
        return ["model.safetensors"]
    if list(directory.glob("*.bin")) or list(directory.glob("*.pt")):
        raise CheckpointNotFound(
            f"{directory} holds pickled weights (.bin), which can run code when they are opened. "
            "Swarm reads safetensors and GGUF only: convert the checkpoint with save_pretrained()."
        )
    raise CheckpointNotFound(f"{directory} holds no model.safetensors and no model.safetensors.index.json.")


def _read_header(path: Path) -> list[TensorEntry]:
    """Parse a shard's header: 8 bytes of length, then JSON (https://github.com/huggingface/safetensors#format)."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            entries = []
            for name in file.keys():  # noqa: SIM118 - not a mapping
                view = file.get_slice(name)
                shape, dtype = tuple(view.get_shape()), view.get_dtype()
                entries.append(TensorEntry(name, shape, dtype, math.prod(shape) * _SAFETENSORS_BITS[dtype] // 8))
            return entries
    except KeyError as error:
        raise CorruptCheckpoint(f"{path} stores tensors of the unknown type {error}.") from error
    except (SafetensorError, OSError) as error:
        raise CorruptCheckpoint(f"{path} is damaged or cut short: {error}. Download the file again.") from error
