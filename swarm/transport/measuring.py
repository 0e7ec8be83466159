"""Measure the way to a peer: both ends of a measuring stream.

Whoever asks sends commands of nine bytes, a kind and a number, and gets answers of the same form::

    P nonce         →   P nonce                         round trip
    U size          →   U size                          upload: go ahead
    so many bytes   →   U the last 8 bytes, as a number
    D size          →   D size, so many bytes           download
    any of them     →   R 0                             not now

The answers to a ping and to an upload repeat what only one who received it can know, and a download is timed where it
arrives: a peer can make the way to itself look slow, hardly fast. What a measurement may cost is limited
(:mod:`swarm.transport.measuring_limits`); whoever asks for more loses the stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import struct
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from swarm.errors import PeerError, PeerUnreachable, ProtocolError
from swarm.transport.measuring_limits import MAX_TRANSFER_BYTES, MeasuringLimits
from swarm.transport.node import Node

logger = logging.getLogger(__name__)

MEASURE_PROTOCOL = "/swarm/measure/1"
MAX_PINGS = 8
COMMAND = struct.Struct(">cQ")
PING, UPLOAD, DOWNLOAD, REFUSED = b"P", b"U", b"D", b"R"
MIN_TRANSFER_BYTES = 4096
"""Less tells nothing, and would let a stranger ask more often."""
_NONCE_BYTES = 8
_PINGS = 5
_PIECE_BYTES = 64 * 1024
_WARM_UP_BYTES = MAX_TRANSFER_BYTES // 4
"""Sent first, so that TCP has found its pace when the rest is timed."""
_LONG_S = 1.0
"""A warm-up that took longer tells enough: the rest is not sent."""
_ASKING_TIMEOUT_S = 25.0
_ANSWERING_TIMEOUT_S = 30.0
_COMMAND_TIMEOUT_S = 5.0
_FAILURES = (OSError, TimeoutError, asyncio.IncompleteReadError)


@dataclass(frozen=True)
class MeasuredLink:
    """The way to a peer, as it was found."""

    round_trip_s: float
    """The shortest of a few."""
    upload_bytes_per_s: float | None = None
    """From here to there; None: not measured, or the peer was too busy for it."""
    download_bytes_per_s: float | None = None


async def measure_link(node: Node, peer_id: str, addresses: Sequence[str], *, transfers: bool) -> MeasuredLink:
    """Measure the round trip to a peer and, with `transfers`, what goes through in each direction (1 MiB at most).

    Raises:
        PeerError: the peer cannot be reached, answers nonsense, or lets nobody measure now.
    """
    await node.connect(peer_id, addresses)
    reader, writer = await node.open_stream(peer_id, MEASURE_PROTOCOL)
    asking = _Asking(peer_id, reader, writer)
    try:
        async with asyncio.timeout(_ASKING_TIMEOUT_S):
            round_trip_s = min([await asking.ping() for _ in range(_PINGS)])
            upload = download = None
            if transfers:
                with contextlib.suppress(_Refused):
                    upload = await _bytes_per_s(asking.upload, round_trip_s)
                    download = await _bytes_per_s(asking.download, round_trip_s)
            return MeasuredLink(round_trip_s, upload, download)
    except _FAILURES as error:
        raise PeerUnreachable(f"{peer_id} did not let us measure: {str(error) or type(error).__name__}") from error
    finally:
        writer.close()


async def _bytes_per_s(transfer: Callable[[int], Awaitable[float]], round_trip_s: float) -> float:
    """What `transfer` (bytes → seconds) gets beyond the round trip; a peer's slow pings change it twofold at most."""
    size = _WARM_UP_BYTES
    seconds = await transfer(size)
    if seconds < _LONG_S:
        size = MAX_TRANSFER_BYTES - _WARM_UP_BYTES
        seconds = await transfer(size)
    return size / max(seconds - round_trip_s, seconds / 2)


class _Refused(PeerError):
    """The peer does not want to be measured now."""


class _Asking:
    """The end that measures: every method takes as long as it says, in seconds."""

    def __init__(self, peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._peer_id, self._reader, self._writer = peer_id, reader, writer

    async def ping(self) -> float:
        nonce = secrets.token_bytes(_NONCE_BYTES)
        begun = time.perf_counter()
        self._writer.write(PING + nonce)
        await self._answer(PING, int.from_bytes(nonce))
        return time.perf_counter() - begun

    async def upload(self, size: int) -> float:
        nonce = secrets.token_bytes(_NONCE_BYTES)
        self._writer.write(COMMAND.pack(UPLOAD, size))
        await self._answer(UPLOAD, size)
        begun = time.perf_counter()
        await _write_noise(self._writer, size - _NONCE_BYTES)
        self._writer.write(nonce)
        await self._answer(UPLOAD, int.from_bytes(nonce))
        return time.perf_counter() - begun

    async def download(self, size: int) -> float:
        begun = time.perf_counter()
        self._writer.write(COMMAND.pack(DOWNLOAD, size))
        await self._answer(DOWNLOAD, size)
        await _read_away(self._reader, size)
        return time.perf_counter() - begun

    async def _answer(self, kind: bytes, number: int) -> None:
        await self._writer.drain()
        answer = COMMAND.unpack(await self._reader.readexactly(COMMAND.size))
        if answer[0] == REFUSED:
            raise _Refused(f"{self._peer_id} does not want to be measured now")
        if answer != (kind, number):
            raise ProtocolError(f"{self._peer_id} answered a measurement with something else")


class MeasuringServer:
    """Lets peers measure the way to this one, within limits."""

    def __init__(self, is_busy: Callable[[], bool]) -> None:
        """
        Args:
            is_busy: while this says so, round trips are all that can be measured.
        """
        self._is_busy = is_busy
        self._limits = MeasuringLimits()

    async def handle(self, peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer on a peer's stream until it has measured; one that breaks the protocol loses this stream only."""
        try:
            if not self._limits.begin(peer_id, time.monotonic()):
                await _read_command(reader)  # what was not read when the stream ends would take the answer with it
                writer.write(COMMAND.pack(REFUSED, 0))
                return
            try:
                async with asyncio.timeout(_ANSWERING_TIMEOUT_S):
                    await self._answer(reader, writer)
            finally:
                self._limits.end()
        except ProtocolError as error:
            logger.warning("closed a measuring stream of %s: %s", peer_id, error)
        except _FAILURES:
            logger.debug("%s stopped measuring", peer_id)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left = {PING: MAX_PINGS, UPLOAD: MAX_TRANSFER_BYTES, DOWNLOAD: MAX_TRANSFER_BYTES}
        while True:
            kind, number = await _read_command(reader)
            cost = 1 if kind == PING else number
            if kind not in left or cost > left[kind] or (kind != PING and number < MIN_TRANSFER_BYTES):
                raise ProtocolError(f"{kind!r} {number} is no command, or over the limits")
            left[kind] -= cost
            if kind != PING and self._is_busy():
                writer.write(COMMAND.pack(REFUSED, 0))
                return
            writer.write(COMMAND.pack(kind, number))
            if kind == DOWNLOAD:
                await _write_noise(writer, number)
            elif kind == UPLOAD:
                await _read_away(reader, number - _NONCE_BYTES)
                writer.write(UPLOAD + await reader.readexactly(_NONCE_BYTES))
            await writer.drain()


async def _read_command(reader: asyncio.StreamReader) -> tuple[bytes, int]:
    async with asyncio.timeout(_COMMAND_TIMEOUT_S):
        kind, number = COMMAND.unpack(await reader.readexactly(COMMAND.size))
    return kind, number


async def _write_noise(writer: asyncio.StreamWriter, size: int) -> None:
    """`size` bytes that nothing on the way can compress, never many of them in memory."""
    piece = memoryview(secrets.token_bytes(_PIECE_BYTES))
    for begin in range(0, size, _PIECE_BYTES):
        writer.write(piece[: size - begin])
        await writer.drain()


async def _read_away(reader: asyncio.StreamReader, size: int) -> None:
    while size:
        data = await reader.read(min(size, _PIECE_BYTES))
        if not data:
            raise asyncio.IncompleteReadError(b"", size)
        size -= len(data)
