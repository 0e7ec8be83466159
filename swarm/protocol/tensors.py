"""Tensors as bytes: raw, row-major, little-endian; described in the frame's header.

On a big-endian machine the bytes would have to be swapped; torch runs on none that we know of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field

from swarm.errors import ProtocolError
from swarm.protocol.frames import MAX_PAYLOAD_BYTES, Buffer

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "int8": torch.int8,
}
"""The element types that may travel, by name."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorHeader(BaseModel):
    """What a frame's header says of one tensor in its payload."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    name: str = Field(max_length=32)
    dtype: str = Field(max_length=16)
    shape: list[int] = Field(max_length=4)


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` → ``"float32"``. Raises ValueError for types that do not travel."""
    try:
        return _NAMES[dtype]
    except KeyError:
        raise ValueError(f"{dtype} tensors cannot be sent; convert them to one of {', '.join(DTYPES)}") from None


def encode_tensors(tensors: dict[str, torch.Tensor]) -> tuple[list[TensorHeader], list[Buffer]]:
    """Headers and payload parts for `tensors`; memory on the CPU is not copied."""
    headers: list[TensorHeader] = []
    parts: list[Buffer] = []
    for name, tensor in tensors.items():
        flat = tensor.detach().to("cpu").contiguous()
        header = TensorHeader.model_construct(name=name, dtype=dtype_name(flat.dtype), shape=list(flat.shape))
        headers.append(header)
        parts.append(flat.reshape(-1).view(torch.uint8).numpy().data)
    return headers, parts


def decode_tensors(headers: Sequence[TensorHeader], payload: bytearray) -> dict[str, torch.Tensor]:
    """The tensors in `payload`, which they go on using.

    Raises:
        ProtocolError: the headers do not describe the payload exactly.
    """
    tensors: dict[str, torch.Tensor] = {}
    offset = 0
    for header in headers:
        dtype = DTYPES.get(header.dtype)
        if dtype is None:
            raise ProtocolError(f"tensor {header.name!r} has the unknown type {header.dtype!r}")
        # A tensor without elements takes no bytes, whatever its other sizes: these must be bounded too.
        if min(header.shape, default=0) < 0 or math.prod(max(size, 1) for size in header.shape) > MAX_PAYLOAD_BYTES:
            raise ProtocolError(f"tensor {header.name!r} has the impossible shape {header.shape}")
        if header.name in tensors:
            raise ProtocolError(f"a frame carries the tensor {header.name!r} twice")
        count = math.prod(header.shape)
        if count * dtype.itemsize > len(payload) - offset:
            raise ProtocolError(f"tensor {header.name!r} is longer than its frame")
        tensors[header.name] = (
            torch.frombuffer(payload, dtype=dtype, count=count, offset=offset).reshape(header.shape)
            if count
            else torch.empty(header.shape, dtype=dtype)
        )
        offset += count * dtype.itemsize
    if offset != len(payload):
        raise ProtocolError(f"a frame carries {len(payload) - offset} bytes that belong to no tensor")
    return tensors
