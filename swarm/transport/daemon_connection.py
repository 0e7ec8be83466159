"""hivemind's connection to p2pd, over which the calls of the DHT go and their answers come."""

from __future__ import annotations

import asyncio
from uuid import UUID

from swarm.transport.lean_hivemind import P2P


class DaemonConnection:
    """Mends the connection of `p2p`, and notices its end."""

    def __init__(self, p2p: P2P) -> None:
        self._control = p2p._client.control
        assert not self._control._pending_calls
        self._control._pending_calls = _AwaitedCalls()
        for task in self._tasks:
            task.add_done_callback(_see)

    @property
    def is_open(self) -> bool:
        """Whether calls can be sent to p2pd, and its answers be read."""
        return not any(task.done() for task in self._tasks)

    async def ended(self) -> None:
        """Wait until it is not."""
        await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)

    @property
    def _tasks(self) -> tuple[asyncio.Task[None], asyncio.Task[None]]:
        return self._control._read_task, self._control._write_task


def _see(task: asyncio.Task[None]) -> None:
    """That it ended is all that counts: nobody need be told why."""
    if not task.cancelled():
        task.exception()


class _AwaitedCalls(dict[UUID, "asyncio.Future[bytes]"]):
    """Calls by their ids; those that are done, or given up, are not in it.

    hivemind sets the result of any call that is in it when the answer comes. Of one that was given up in the same
    moment (a time limit suffices) it cannot be set, and the task that reads all answers would end with that: from then
    on this process would be deaf to the whole DHT.
    """

    def __contains__(self, call_id: object) -> bool:
        future = self.get(call_id) if isinstance(call_id, UUID) else None
        return future is not None and not future.done()
