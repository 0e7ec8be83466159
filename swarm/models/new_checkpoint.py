"""Write a checkpoint into a directory: all of its files appear there, or none does.

The files are written beside their places, in a directory that nobody takes for a checkpoint, and moved when all of
them are complete.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from swarm.errors import DiskError
from swarm.models.digests import MANIFEST

COMPANIONS = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
    "tekken.json", "chat_template*",
)  # fmt: skip
"""Patterns of the small files that a checkpoint may have beside its configuration and weights."""

_CONFIG, _INDEX = "config.json", "model.safetensors.index.json"
_REPLACED = (_CONFIG, _INDEX, "model*.safetensors", MANIFEST, *COMPANIONS)
_UNFINISHED = ".unfinished-"
_REMEDY = "Make room, or choose a directory on another disk."


class NewCheckpoint:
    """A checkpoint that is being written. Made by :func:`new_checkpoint`."""

    directory: Path
    """Where its files are until they are complete."""

    def __init__(self, directory: Path, output: Path, shards: int) -> None:
        self.directory, self._output, self._shards = directory, output, shards
        self._shard_of: dict[str, str] = {}
        self._written = self._weights_bytes = 0

    def add_shard(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write the next shard. Tensors must be contiguous, and none may share memory with another's elements.

        Raises:
            DiskError: there is no room.
        """
        self._written += 1
        shard = f"model-{self._written:05}-of-{self._shards:05}.safetensors"
        with _disk_errors(self._output):
            save_file(dict(tensors), self.directory / shard, metadata={"format": "pt"})  # for its owner only
        self._shard_of |= dict.fromkeys(tensors, shard)
        self._weights_bytes += sum(tensor.nbytes for tensor in tensors.values())

    def add(self, write: Callable[[Path], object]) -> None:
        """Let `write` put files into the directory.

        Raises:
            DiskError: there is no room.
        """
        with _disk_errors(self._output):
            write(self.directory)

    def complete(self, *, overwrite: bool) -> None:
        """Write the index of shards, and move everything to its place; the configuration, which makes it a checkpoint,
        last."""
        if self._written != self._shards:
            raise ValueError(f"{self._written} of {self._shards} shards were written")
        index = {"metadata": {"total_size": self._weights_bytes}, "weight_map": dict(sorted(self._shard_of.items()))}
        with _disk_errors(self._output):
            (self.directory / _INDEX).write_text(json.dumps(index, indent=2))
            for shard in self.directory.glob("*.safetensors"):
                shutil.copymode(self.directory / _INDEX, shard)
            if overwrite:
                _remove_checkpoint(self._output, keep=self.directory)
            for path in sorted(self.directory.iterdir(), key=lambda path: path.name == _CONFIG):
                path.replace(self._output / path.name)


@contextmanager
def new_checkpoint(
    output: Path, *, shards: int, weights_bytes: int, overwrite: bool = False
) -> Iterator[NewCheckpoint]:
    """A checkpoint to write to, which appears as `output` when the ``with`` block ends. If that fails, nothing is left.

    Args:
        shards: how many there will be.
        weights_bytes: how much they will hold.
        overwrite: replace the checkpoint in `output`, if there is one; its other files stay.

    Raises:
        ValueError: there is something in `output` already (and not `overwrite`), or it is no directory.
        DiskError: there is no room, or no permission.
    """
    with _disk_errors(output):
        if output.exists() and not output.is_dir():
            raise ValueError(f"{output} is not a directory.")
        if not overwrite and output.exists() and any(output.iterdir()):
            raise ValueError(
                f"{output} is not empty: choose another directory, or pass --force to replace the checkpoint in it."
            )
        made = [directory for directory in (output, *output.parents) if not directory.exists()]
    try:
        with _disk_errors(output):
            output.mkdir(parents=True, exist_ok=True)
            _check_room(output, weights_bytes)
            unfinished = tempfile.TemporaryDirectory(dir=output, prefix=_UNFINISHED, ignore_cleanup_errors=True)
        with unfinished:
            new = NewCheckpoint(Path(unfinished.name), output, shards)
            yield new
            new.complete(overwrite=overwrite)
    except BaseException:
        for directory in made:
            with contextlib.suppress(OSError):  # it was not made, or somebody else has put something there
                directory.rmdir()
        raise


def _check_room(output: Path, weights_bytes: int) -> None:
    free = shutil.disk_usage(output).free
    if free < weights_bytes:
        raise DiskError(
            f"The checkpoint's weights need {weights_bytes / 1024**2:,.1f} MiB in {output}, where only "
            f"{free / 1024**2:,.1f} MiB are free. {_REMEDY}"
        )


def _remove_checkpoint(output: Path, keep: Path) -> None:
    for path in {path for pattern in _REPLACED for path in output.glob(pattern)}:
        if not path.is_dir():
            path.unlink()
    for path in output.glob(f"{_UNFINISHED}*"):  # left by a process that was killed
        if path != keep:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _disk_errors(output: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # The tokenizers library raises a bare Exception for a full disk.
        if not isinstance(error, OSError | SafetensorError) and type(error) is not Exception:
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise DiskError(f"The checkpoint cannot be written to {output}: {reason}. {_REMEDY}") from error
