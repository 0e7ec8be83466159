"""TUN devices: how the relay reads the packets of a namespace's kernel, and hands it others'."""

from __future__ import annotations

import fcntl
import os
import struct

DEVICE = "lab0"
MAX_FRAME_BYTES = 65535 + 10

_TUNSETIFF = 0x400454CA
_TUNSETOFFLOAD = 0x400454D0
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
_TUN_F_CSUM, _TUN_F_TSO4 = 0x01, 0x02


def open_tun() -> int:
    """Make the device in the calling thread's namespace; it goes when the descriptor is closed.

    Returns:
        A non-blocking descriptor that reads and takes one frame at a time, see `tests.netlab.bursts`.
    """
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    flags = _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), flags))
    fcntl.ioctl(descriptor, _TUNSETOFFLOAD, _TUN_F_CSUM | _TUN_F_TSO4)
    return descriptor
