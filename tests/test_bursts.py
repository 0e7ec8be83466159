"""Losing single packets of a TCP burst leaves frames that carry exactly the others."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from tests.netlab import bursts

_PER_PACKET = 10
_HEADERS = 20 + 32  # IP, and TCP with timestamps
_FIRST_SEQUENCE = 0xFFFFFFF0  # wraps around
_SOURCE, _TARGET = bytes([10, 77, 0, 1]), bytes([10, 77, 0, 2])


def burst(payload: bytes) -> bytes:
    frame_header = struct.pack("=BBHHHH", 1, 1, _HEADERS, _PER_PACKET, 20, 16)
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, _HEADERS + len(payload), 7, 0, 64, 6, 0, _SOURCE, _TARGET)
    tcp = struct.pack("!HHIIBBHHH12x", 1000, 2000, _FIRST_SEQUENCE, 1, 8 << 4, 0x19, 100, 0, 0)
    return frame_header + ip + tcp + payload


@given(payload=st.binary(min_size=11, max_size=95), data=st.data())
def test_the_packets_that_were_not_lost_remain(payload: bytes, data: st.DataObject) -> None:
    frame = burst(payload)
    packets, size_bytes = bursts.packets_and_size(frame)
    assert packets == -(-len(payload) // _PER_PACKET)
    assert size_bytes == packets * _HEADERS + len(payload)
    assert bursts.destination(frame) == _TARGET
    lost = sorted(data.draw(st.sets(st.integers(0, packets - 1))))

    arrived: dict[int, int] = {}
    for rest in bursts.without(frame, lost):
        _, kind, _, per_packet, _, _ = struct.unpack_from("=BBHHHH", rest)
        ip, tcp, left = rest[10:30], rest[30:62], rest[62:]
        assert (kind, per_packet) == ((1, _PER_PACKET) if len(left) > _PER_PACKET else (0, 0))
        assert rest == frame or sum(struct.unpack("!10H", ip)) % 0xFFFF == 0  # the checksum is right
        length, identification = struct.unpack_from("!HH", ip, 2)
        assert length == _HEADERS + len(left)
        offset = (struct.unpack_from("!I", tcp, 4)[0] - _FIRST_SEQUENCE) % 2**32
        assert identification == 7 + offset // _PER_PACKET
        assert bool(tcp[13] & 1) == (offset + len(left) == len(payload))  # FIN comes last
        arrived.update({offset + index: value for index, value in enumerate(left)})
    assert arrived == {index: value for index, value in enumerate(payload) if index // _PER_PACKET not in lost}
