"""One end of a stream: bytes in, messages out. Greetings and pings are dealt with here, the same on every stream."""

from __future__ import annotations

import torch

from swarm import __version__
from swarm.errors import ProtocolError
from swarm.protocol.frames import Buffer, FrameDecoder
from swarm.protocol.messages import (
    PROTOCOL_VERSION,
    Hello,
    Message,
    Ping,
    Pong,
    decode_message,
    encode_message,
)

_HELLO = Hello(version=PROTOCOL_VERSION, agent=f"swarm/{__version__}")

Received = tuple[Message, dict[str, torch.Tensor]]


class Wire:
    """Feed it the bytes that arrive, act on the messages, and write what :meth:`take_outgoing` hands over.

    It begins with our ``Hello``, and lets nothing pass before the other side's.
    """

    def __init__(self) -> None:
        self._decoder = FrameDecoder()
        self._outgoing: list[Buffer] = []
        self._greeted = False
        self.send(_HELLO)

    def send(self, message: Message, tensors: dict[str, torch.Tensor] | None = None) -> None:
        """Queue a message.

        Raises:
            FrameTooLarge: the tensors do not fit in one frame.
        """
        self._outgoing += encode_message(message, tensors)

    def take_outgoing(self) -> list[Buffer]:
        """The buffers to write now."""
        outgoing, self._outgoing = self._outgoing, []
        return outgoing

    def receive(self, data: Buffer) -> list[Received]:
        """The messages that `data` completes: everything but greetings and pings (these are answered).

        Raises:
            ProtocolError: the other side broke the protocol: close the stream.
        """
        messages: list[Received] = []
        for frame in self._decoder.feed(data):
            message, tensors = decode_message(frame)
            if isinstance(message, Hello):
                self._greet(message)
            elif not self._greeted:
                raise ProtocolError(f"unexpected message {message.type!r} before a greeting")
            elif isinstance(message, Ping):
                self.send(Pong())
            else:
                messages.append((message, tensors))
        return messages

    def _greet(self, hello: Hello) -> None:
        if self._greeted:
            raise ProtocolError("unexpected message 'hello': the second one")
        if hello.version != PROTOCOL_VERSION:
            older = "the peer" if hello.version < PROTOCOL_VERSION else "this side"
            raise ProtocolError(
                f"the peer ({hello.agent!r}) speaks version {hello.version} of the protocol, this side version "
                f"{PROTOCOL_VERSION}: {older} must be updated"
            )
        self._greeted = True
