"""Keep single blocks on disk as they are served: one file each, written whole or not at all, checked when opened.

A file is a header of whole pages (JSON: what it holds, where its tensors lie, a checksum), and then the tensors in the
precision, quantization and order in which they are served: a map of the file is ready to compute with.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import logging
import mmap
import os
import secrets
import shutil
import stat
import time
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import BinaryIO

import torch
import transformers

from swarm.cache_directory import cache_directory
from swarm.errors import DiskError

logger = logging.getLogger(__name__)

_MAGIC = b"SWARMBLK"
_FORMAT = 1
_PAGE_BYTES = 4096
_ALIGNMENT_BYTES = 64
_CHUNK_BYTES = 1024**2
_LIBC = ctypes.CDLL(None, use_errno=True)
_POPULATE_READ = 22
"""MADV_POPULATE_READ, which Python does not name."""
_ABANDONED_S = 3600.0
"""A temporary file that nobody has written to for this long was left by a process that was killed."""
_REMEDY = (
    "Make room, set SWARM_HOME to a directory on another disk, give more --memory, host fewer blocks, or choose a "
    "smaller --dtype."
)


@dataclass(frozen=True)
class BlockKey:
    """Which block, and how it is served: whatever has the same key has the same tensors."""

    digest: str
    """Of the block's weights in the checkpoint."""
    config_digest: str
    """Of the model's configuration, by which weights are merged and reordered when they are loaded."""
    dtype: str
    quantization: str | None
    """And how such weights lie."""
    transformers: str = transformers.__version__
    """Its version: its modules decide what a block's tensors are."""
    format: int = _FORMAT

    @property
    def path(self) -> Path:
        """Where the block's file is, if it is anywhere."""
        how = "-".join(filter(None, [self.dtype.removeprefix("torch."), self.quantization]))
        stamp = hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()
        return cache_directory("offload") / f"{self.digest[:16]}-{how}-{stamp[:16]}.block"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a block, and where it lies behind the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    transposed: bool
    """A matrix that lies column by column."""
    offset: int
    size_bytes: int

    def view_in(self, memory: torch.Tensor) -> torch.Tensor:
        """The tensor, where `memory` (uint8) holds what is behind the header."""
        flat = memory[self.offset : self.offset + self.size_bytes].view(getattr(torch, self.dtype))
        return flat.view(self.shape[::-1]).t() if self.transposed else flat.view(self.shape)


class BlockFile:
    """A block's file, mapped: its tensors have addresses, and their pages come from disk when they are touched.

    Made by :func:`open_block`. It stays readable when another process replaces or removes the file.

    Attributes:
        memory: uint8, read-only: the tensors as they lie in the file.
    """

    def __init__(self, path: Path, map_: mmap.mmap, tensors: tuple[StoredTensor, ...], header_bytes: int) -> None:
        self.path, self.tensors = path, tensors
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # nobody writes to weights
            self.memory = torch.frombuffer(map_, dtype=torch.uint8)[header_bytes:]
        self._map = map_

    def views_in(self, memory: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors by name, where `memory` (uint8, on any device) is, or will be, a copy of :attr:`memory`."""
        return {tensor.name: tensor.view_in(memory) for tensor in self.tensors}

    def bring(self) -> None:
        """Read all of it into memory, and map it; other Python threads run meanwhile.

        Raises:
            DiskError: it cannot be read, or was cut short.
        """
        code = _madvise(self.memory, _POPULATE_READ)
        if code == errno.EINVAL:  # not Linux, or before 5.14: touch every page
            self._map.madvise(mmap.MADV_WILLNEED)
            self.memory[::_PAGE_BYTES].sum()
        elif code:
            raise DiskError(
                f"{self.path} cannot be read any more ({os.strerror(code)}): its disk has failed, or it was cut short. "
                "Start the server again."
            )

    def drop(self) -> None:
        """Take it out of this process's memory. What touches it later brings it back, page by page."""
        _madvise(self.memory, mmap.MADV_DONTNEED)


def open_block(key: BlockKey) -> BlockFile | None:
    """The block's file if there is one; one that is damaged is reported, and not used.

    Reads all of it, to compare its checksum: about 1 s per GB.
    """
    path = key.path
    try:
        file = path.open("rb", buffering=0)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DiskError(f"{path} cannot be read: {error.strerror}.") from error
    with file:
        try:
            return _checked(path, file, key)
        except (ValueError, KeyError, TypeError, OSError) as error:
            logger.warning("%s is damaged, and is made anew: %s", path, error)
            return None


def prepare_directory(needed_bytes: int) -> None:
    """Make the directory of all blocks' files, clear it of what killed processes left, and check that there is room.

    Raises:
        DiskError: it cannot be made, or `needed_bytes` are more than are free.
    """
    directory = cache_directory("offload")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(directory)
        free = shutil.disk_usage(directory).free
    except OSError as error:
        raise _explained(error, directory) from error
    if free < needed_bytes:
        raise DiskError(
            f"The blocks to offload need {needed_bytes / 1024**2:,.1f} MiB in {directory}, where only "
            f"{free / 1024**2:,.1f} MiB are free. {_REMEDY}"
        )


def write_block(
    key: BlockKey, tensors: Mapping[str, torch.Tensor], transposed_shapes: Collection[torch.Size] = ()
) -> Path:
    """Write a block's file under its name, at once; nobody ever sees half of it.

    Args:
        transposed_shapes: matrices of these shapes are laid out column by column.

    Raises:
        DiskError: there is no room, or no permission. Nothing is left behind.
    """
    path = key.path
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb", buffering=0) as file:
            _write(file, key, tensors, transposed_shapes)
            os.fchmod(file.fileno(), stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH)  # a map cannot bear a shortened file
        temporary.replace(path)
    except OSError as error:
        raise _explained(error, path.parent) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return path


def _write(
    file: BinaryIO, key: BlockKey, tensors: Mapping[str, torch.Tensor], transposed_shapes: Collection[torch.Size]
) -> None:
    table, offset = [], 0
    for name, tensor in tensors.items():
        size, dtype = tensor.numel() * tensor.element_size(), str(tensor.dtype).removeprefix("torch.")
        transposed = tensor.dim() == 2 and tensor.shape in transposed_shapes
        table.append(StoredTensor(name, dtype, tuple(tensor.shape), transposed, offset, size))
        offset += -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    checksum = _checksum_of(table)
    header = _header(key, table, checksum.hexdigest())
    _write_all(file, header)
    for entry, tensor in zip(table, tensors.values(), strict=True):
        piece = _bytes_of(tensor.t() if entry.transposed else tensor)
        padding = bytes(-entry.size_bytes % _ALIGNMENT_BYTES)
        for part in (piece, padding):
            checksum.update(part)
            _write_all(file, part)
    file.seek(0)
    _write_all(file, _header(key, table, checksum.hexdigest()))


def _write_all(file: BinaryIO, data: memoryview | bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _header(key: BlockKey, table: Collection[StoredTensor], checksum: str) -> bytes:
    fields = {"key": asdict(key), "checksum": checksum, "tensors": [astuple(entry) for entry in table]}
    text = json.dumps(fields).encode()
    return (_MAGIC + len(text).to_bytes(4, "little") + text).ljust(_header_bytes(len(text)), b"\0")


def _header_bytes(text_bytes: int) -> int:
    return -(-(len(_MAGIC) + 4 + text_bytes) // _PAGE_BYTES) * _PAGE_BYTES


def _checked(path: Path, file: BinaryIO, key: BlockKey) -> BlockFile:
    """Raises ValueError, KeyError or TypeError if the file is not what was written."""
    if file.read(len(_MAGIC)) != _MAGIC:
        raise ValueError("it does not begin as such files do")
    length = int.from_bytes(file.read(4), "little")
    fields = json.loads(file.read(length))
    if fields["key"] != asdict(key):
        raise ValueError("it holds something else")
    tensors = tuple(
        StoredTensor(name, dtype, tuple(shape), transposed, offset, size)
        for name, dtype, shape, transposed, offset, size in fields["tensors"]
    )
    header_bytes = _header_bytes(length)
    if os.fstat(file.fileno()).st_size != header_bytes + _payload_bytes(tensors):
        raise ValueError("it has been cut short")
    checksum = _checksum_of(tensors)
    file.seek(header_bytes)
    for chunk in _chunks(file):
        checksum.update(chunk)
    if checksum.hexdigest() != fields["checksum"]:
        raise ValueError("its checksum is wrong")
    return BlockFile(path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), tensors, header_bytes)


def _chunks(file: BinaryIO) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    while count := file.readinto(buffer):  # type: ignore[attr-defined]
        yield buffer[:count]


def _checksum_of(table: Collection[StoredTensor]) -> hashlib._Hash:
    return hashlib.sha256(json.dumps([astuple(entry) for entry in table]).encode())


def _payload_bytes(table: Collection[StoredTensor]) -> int:
    return sum(-(-entry.size_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for entry in table)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy())


def _madvise(memory: torch.Tensor, advice: int) -> int:
    """madvise(2), unlike Python's without its lock; returns the error's number, or 0."""
    done = _LIBC.madvise(ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(memory.numel()), ctypes.c_int(advice))
    return ctypes.get_errno() if done else 0


def _explained(error: OSError, directory: Path) -> DiskError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskError(f"The blocks to offload do not fit in {directory}: {error.strerror}. {_REMEDY}")
    return DiskError(
        f"Blocks to offload cannot be kept in {directory}: {error.strerror}. Set SWARM_HOME to a directory that can "
        "be written to."
    )


def _remove_abandoned(directory: Path) -> None:
    for path in directory.glob(".*.block.*"):
        with contextlib.suppress(OSError):  # another process was faster
            if time.time() - path.stat().st_mtime > _ABANDONED_S:
                path.unlink()
