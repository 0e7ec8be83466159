"""Write to a stream that may have been closed a moment ago."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from swarm.protocol.frames import Buffer


def write(writer: asyncio.StreamWriter, buffers: Sequence[Buffer]) -> None:
    """Write `buffers`, without waiting.

    Raises:
        ConnectionResetError: the stream is closed. uvloop's own error for that is a bare RuntimeError.
    """
    try:
        writer.writelines(buffers)
    except RuntimeError as error:
        raise ConnectionResetError(str(error)) from error
