"""Every error that Swarm raises on purpose, in one tree.

::

    SwarmError
    ├── ModelError                  the checkpoint or its family
    │   ├── CheckpointNotFound      nothing to open at that name or path
    │   ├── CorruptCheckpoint       a file is damaged, cut short or missing
    │   └── UnsupportedFamily       this architecture cannot be split exactly
    ├── InsufficientMemory          the plan does not fit the machine
    ├── DiskError                   what must be kept on disk cannot be written, or read back
    ├── PeerError                   another peer, or the way to it
    │   ├── BootstrapFailed         no initial peer answered
    │   ├── PortTaken               the address to listen on is in use
    │   ├── DaemonDied              p2pd, through which this process reaches the others, is gone
    │   ├── PeerUnreachable         the peer could not be dialled, hung up, or fell silent
    │   └── ProtocolError           the peer sent something that is not our protocol
    │       └── FrameTooLarge       a frame over the limit
    ├── RemoteError                 a server answered with a refusal
    │   ├── WrongModel              it hosts other weights
    │   ├── BlocksNotHosted         it does not host (any longer) what was asked
    │   ├── CacheFull               no room for this session's KV cache, as yet
    │   │   └── SessionTooLarge     nor would there be if nobody else were there
    │   ├── Draining                it takes no new session
    │   ├── ExpertsMissing          nobody hosts some expert that a token needs
    │   ├── Forgotten               it has forgotten a beginning that it said it knew
    │   └── ServerFault             its computation failed
    ├── NoRoute                     some block has no server, until the deadline
    │   └── NoRoom                  it has, but none with room for this session's KV cache
    └── SessionClosed               the session was used after its end
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

E = TypeVar("E", bound=BaseException)


class SwarmError(Exception):
    """The root: catch this to catch everything that Swarm raises on purpose."""


class ModelError(SwarmError):
    """Something is wrong with the checkpoint, or its family is not supported."""


class CheckpointNotFound(ModelError):
    """There is no checkpoint at the given name or path."""


class CorruptCheckpoint(ModelError):
    """A weight file is damaged, truncated or missing."""


class UnsupportedFamily(ModelError):
    """The model's architecture cannot be split into spans exactly."""


class InsufficientMemory(SwarmError):
    """What was asked for does not fit in the memory that was given."""


class DiskError(SwarmError):
    """What must be kept on disk cannot be written, or not be read back."""


class PeerError(SwarmError):
    """Another peer, or the way to it, failed."""


class BootstrapFailed(PeerError):
    """None of the initial peers answered."""


class PortTaken(PeerError):
    """The address to listen on is used by another program."""


class DaemonDied(PeerError):
    """p2pd has died, or can be reached no longer: this process is cut off from all others."""


class PeerUnreachable(PeerError):
    """The peer could not be dialled, hung up, or fell silent."""


class ProtocolError(PeerError):
    """The peer sent bytes that are not our protocol."""


class FrameTooLarge(ProtocolError):
    """The peer announced a frame above the limit."""


class RemoteError(SwarmError):
    """A server understood the request and refused it."""

    code = "refused"


class WrongModel(RemoteError):
    """The server hosts other weights than the client asked for."""

    code = "wrong_model"


class BlocksNotHosted(RemoteError):
    """The server does not host the blocks that were asked for."""

    code = "blocks_not_hosted"


class CacheFull(RemoteError):
    """The server has no room for the session's KV cache."""

    code = "cache_full"


class SessionTooLarge(CacheFull):
    """The session needs more KV cache than the server has in all: waiting would not help."""

    code = "session_too_large"


class Draining(RemoteError):
    """The server is leaving and takes no new session."""

    code = "draining"


class ExpertsMissing(RemoteError):
    """Some experts of a block are hosted by nobody, or nobody who hosts them answers."""

    code = "experts_missing"

    def __init__(self, reason: str, block: int = -1, experts: Iterable[int] = ()) -> None:
        super().__init__(reason)
        self.block, self.experts = block, frozenset(experts)

    @classmethod
    def of(cls, block: int, experts: Iterable[int]) -> ExpertsMissing:
        """For these experts."""
        numbers = sorted(experts)
        shown = ", ".join(map(str, numbers[:16])) + (f" and {len(numbers) - 16} more" if len(numbers) > 16 else "")
        which = f"expert {shown}" if len(numbers) == 1 else f"experts {shown}"
        return cls(
            f"nobody who can be reached hosts {which} of block {block}; `swarm-server MODEL --experts "
            f"{block}:{','.join(map(str, numbers[:1]))}` would",
            block,
            numbers,
        )


class Forgotten(RemoteError):
    """The server has forgotten the beginning of a session that it said it knew: it must be told all of it."""

    code = "forgotten"


class ServerFault(RemoteError):
    """The server's computation failed."""

    code = "server_fault"


class NoRoute(SwarmError):
    """Some blocks had no live server until the deadline passed."""


class NoRoom(NoRoute):
    """Servers are there, but full until the deadline, or too small for the session altogether."""


class SessionClosed(SwarmError):
    """The session was used after it had been closed."""


def first_of(errors: BaseExceptionGroup[E]) -> E:
    """The first error of a group, whose members may be groups."""
    error: BaseExceptionGroup[E] | E = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


_REMOTE = (
    WrongModel, BlocksNotHosted, CacheFull, SessionTooLarge, Draining, ExpertsMissing, Forgotten, ServerFault,
    RemoteError,
)  # fmt: skip
REMOTE_ERRORS: dict[str, type[RemoteError]] = {error.code: error for error in _REMOTE}
"""The refusals that travel on the wire, by code."""
