"""Content digests of a model's weights: one per block, one for the shell, one over all.

The model's digest is the root of a two-level Merkle tree: SHA-256 over the shell's digest and the
blocks' digests in order. Peers find each other by the root, announce the leaves, and check every block
that they load against its leaf when they know it: from ``swarm-digests.json`` beside the weights
(written by ``swarm digest MODEL --write``), or from an earlier reading of the same files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from swarm.cache_directory import cache_directory, write_atomically
from swarm.errors import CorruptCheckpoint
from swarm.models.tensor_files import TensorFiles

MANIFEST = "swarm-digests.json"


@dataclass(frozen=True)
class Digests:
    """SHA-256 digests in hexadecimal."""

    shell: str
    blocks: tuple[str, ...]

    @property
    def model(self) -> str:
        """The digest that names the whole model."""
        return hashlib.sha256(json.dumps([self.shell, *self.blocks]).encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Digests:
        """Raises ValueError if `text` is not a manifest."""
        fields = json.loads(text)
        if not isinstance(fields, dict) or not isinstance(fields.get("shell"), str):
            raise ValueError("no digests in it")
        return cls(fields["shell"], tuple(str(digest) for digest in fields["blocks"]))


def digest_tensors(files: TensorFiles, names: Iterable[str], on_bytes: Callable[[int], None] = lambda _: None) -> str:
    """SHA-256 over the named tensors: names, types, shapes and bytes as they lie on disk, in order of name."""
    sha = hashlib.sha256()
    for name in sorted(names):
        entry = files.entries[name]
        sha.update(json.dumps([name, entry.stored_as, entry.shape]).encode())
        sha.update(files.raw(name))
        on_bytes(entry.size_bytes)
    return sha.hexdigest()


def known_digests(files: TensorFiles, num_blocks: int) -> Digests | None:
    """What the manifest beside the weights says, or else what was computed for these very files before.

    Raises:
        CorruptCheckpoint: there is a manifest, and it cannot be read or is of a model without `num_blocks` blocks.
    """
    if not files.paths:
        return None
    manifest = files.paths[0].parent / MANIFEST
    if manifest.exists():
        try:
            listed = Digests.from_json(manifest.read_text())
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorruptCheckpoint(
                f"{manifest} is damaged: {error}. Delete it, or write it anew with `swarm digest --write`."
            ) from error
        if len(listed.blocks) != num_blocks:
            raise CorruptCheckpoint(
                f"{manifest} lists {len(listed.blocks)} blocks, and the model has {num_blocks}: one of the two is "
                "damaged, or the list came with another model. Download the checkpoint again (if it was changed on "
                "purpose: `swarm digest --write`)."
            )
        return listed
    try:
        remembered = Digests.from_json(_memory_of(files.paths).read_text())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return remembered if len(remembered.blocks) == num_blocks else None


def remember_digests(files: TensorFiles, digests: Digests) -> None:
    """Keep `digests` for the next time these files are opened."""
    write_atomically(_memory_of(files.paths), digests.to_json())


def _memory_of(paths: Iterable[Path]) -> Path:
    stamps = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return cache_directory("digests") / f"{hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:32]}.json"
