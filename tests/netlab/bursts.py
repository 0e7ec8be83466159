"""Frames as a TUN device hands them over: a TCP burst comes as one frame that stands for many packets.

The kernel leaves it to the "hardware" to cut large TCP segments into packets (TSO) and to fill in checksums. Our
hardware is a link between two kernels, which hands such frames on as they are: TCP behaves as over an MTU of 1500
bytes (initial window, growth, losses), at the cost of a few large frames. Each frame begins with the
``virtio_net_hdr`` of ``linux/virtio_net.h``; then comes the IP packet.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence

_FRAME_HEADER = struct.Struct("=BBHHHH")  # flags, kind of burst, headers, bytes per packet, checksum start and offset
_BURST_TCP4 = 1
_BURST_ECN = 0x80
_FIN_PSH = 0x01 | 0x08
HEADER_BYTES = _FRAME_HEADER.size


def destination(frame: bytes) -> bytes | None:
    """The IPv4 address that a frame goes to, 4 bytes; None if it is not IPv4."""
    if len(frame) < HEADER_BYTES + 20 or frame[HEADER_BYTES] >> 4 != 4:
        return None
    return frame[HEADER_BYTES + 16 : HEADER_BYTES + 20]


def packets_and_size(frame: bytes) -> tuple[int, int]:
    """How many packets a frame stands for, and how many bytes they are on the wire, IP headers included."""
    _, kind, _, payload_per_packet, _, _ = _FRAME_HEADER.unpack_from(frame)
    size = len(frame) - HEADER_BYTES
    if not kind & ~_BURST_ECN:
        return 1, size
    headers = sum(_header_lengths(frame))
    packets = -(-(size - headers) // payload_per_packet)
    return packets, size + (packets - 1) * headers


def without(frame: bytes, lost: Sequence[int]) -> list[bytes]:
    """The frames that are left of a frame when the packets with these indices are lost."""
    _, kind, _, payload_per_packet, _, _ = _FRAME_HEADER.unpack_from(frame)
    packets, _ = packets_and_size(frame)
    if not lost or packets == 1:
        return [] if lost else [frame]
    if kind & ~_BURST_ECN != _BURST_TCP4:
        return []  # not asked for when the device was opened
    borders = [-1, *lost, packets]
    runs = [(before + 1, after) for before, after in itertools.pairwise(borders) if after - before > 1]
    return [_run(frame, first, end, packets, payload_per_packet) for first, end in runs]


def _run(frame: bytes, first: int, end: int, packets: int, payload_per_packet: int) -> bytes:
    """Packets `first` to `end` - 1 of a burst as a frame."""
    ip_length, tcp_length = _header_lengths(frame)
    start = HEADER_BYTES + ip_length + tcp_length
    payload = frame[start + first * payload_per_packet : start + end * payload_per_packet]
    header = bytearray(frame[:start])
    if len(payload) <= payload_per_packet:  # no burst any more
        flags, _, _, _, checksum_start, checksum_offset = _FRAME_HEADER.unpack_from(frame)
        _FRAME_HEADER.pack_into(header, 0, flags, 0, 0, 0, checksum_start, checksum_offset)
    ip, tcp = HEADER_BYTES, HEADER_BYTES + ip_length
    (identification,) = struct.unpack_from("!H", header, ip + 4)
    struct.pack_into("!HH", header, ip + 2, ip_length + tcp_length + len(payload), identification + first & 0xFFFF)
    struct.pack_into("!H", header, ip + 10, 0)
    struct.pack_into("!H", header, ip + 10, _checksum(header[ip:tcp]))
    (sequence,) = struct.unpack_from("!I", header, tcp + 4)
    struct.pack_into("!I", header, tcp + 4, sequence + first * payload_per_packet & 0xFFFFFFFF)
    if end < packets:
        header[tcp + 13] &= ~_FIN_PSH
    # TCP's own checksum is still "to be filled in by the hardware", which tells the receiver not to look at it.
    return bytes(header) + payload


def _header_lengths(frame: bytes) -> tuple[int, int]:
    ip_length = (frame[HEADER_BYTES] & 0xF) * 4
    return ip_length, (frame[HEADER_BYTES + ip_length + 12] >> 4) * 4


def _checksum(header: bytes | bytearray) -> int:
    total = sum(struct.unpack(f"!{len(header) // 2}H", header))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
