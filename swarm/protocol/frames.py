"""Frames: how messages lie on a stream. Bytes in, frames out; no sockets.

A frame is a prefix of 12 bytes, a msgpack header, and a payload of raw tensor bytes::

    "SWRM" | header size: u32 | payload size: u32 | header | payload        (big-endian)

Both sizes are checked against the limits before a byte of either is kept.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

from swarm.errors import FrameTooLarge, ProtocolError

MAGIC = b"SWRM"
MAX_HEADER_BYTES = 64 * 1024
MAX_PAYLOAD_BYTES = 64 * 1024 * 1024

_PREFIX = struct.Struct(">4sII")

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class Frame:
    """One frame as it came off the stream."""

    header: dict[str, Any]
    payload: bytearray


def encode_frame(header: dict[str, Any], payload: Sequence[Buffer] = ()) -> list[Buffer]:
    """The buffers to write, in order, for one frame; `payload` is not copied.

    Raises:
        FrameTooLarge: the frame would be over the limits, so that no peer would take it.
    """
    packed = msgpack.packb(header, use_bin_type=True)
    payload_bytes = sum(memoryview(part).nbytes for part in payload)
    _check_sizes(len(packed), payload_bytes)
    return [_PREFIX.pack(MAGIC, len(packed), payload_bytes) + packed, *payload]


class FrameDecoder:
    """Cuts a stream of bytes into frames, however the bytes are chunked."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: Buffer) -> Iterator[Frame]:
        """Take the next bytes of the stream; yield every frame that they complete.

        Raises:
            FrameTooLarge: a frame is announced that is over the limits.
            ProtocolError: the bytes are not frames.
        """
        self._buffer += data
        while len(self._buffer) >= _PREFIX.size:
            try:
                header_bytes, payload_bytes = _read_prefix(self._buffer)
            except ProtocolError:
                del self._buffer[_PREFIX.size :]
                raise
            end_of_header = _PREFIX.size + header_bytes
            end = end_of_header + payload_bytes
            if len(self._buffer) < end:
                return
            packed, payload = bytes(self._buffer[_PREFIX.size : end_of_header]), self._buffer[end_of_header:end]
            del self._buffer[:end]
            yield Frame(_unpack(packed), payload)


def _read_prefix(data: Buffer) -> tuple[int, int]:
    magic, header_bytes, payload_bytes = _PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise ProtocolError("the peer does not speak Swarm's protocol (wrong magic bytes)")
    _check_sizes(header_bytes, payload_bytes)
    return header_bytes, payload_bytes


def _check_sizes(header_bytes: int, payload_bytes: int) -> None:
    if header_bytes > MAX_HEADER_BYTES or payload_bytes > MAX_PAYLOAD_BYTES:
        raise FrameTooLarge(
            f"a frame of {header_bytes} + {payload_bytes} bytes is over the limit of "
            f"{MAX_HEADER_BYTES} (header) + {MAX_PAYLOAD_BYTES} (payload)"
        )


def _unpack(packed: bytes) -> dict[str, Any]:
    try:
        header = msgpack.unpackb(packed, raw=False, strict_map_key=True)
    except (ValueError, msgpack.UnpackException) as error:
        raise ProtocolError(f"a frame's header is not msgpack: {error}") from error
    if not isinstance(header, dict):
        raise ProtocolError("a frame's header is not a map")
    return header
