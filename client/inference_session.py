"""The session as users hold it: blocking, a context manager, with Petals' names."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import TracebackType

import torch

from swarm.client.background import BackgroundLoop
from swarm.client.foresight import Foresight
from swarm.client.session import Recovery, Session
from swarm.client.timing import HopTiming, StepTiming
from swarm.routing import Leg


class InferenceSession:
    """KV caches on servers for one batch of sequences; made by ``model.inference_session()``.

    Use it as a context manager, or call :meth:`close`; a session that is garbage-collected closes too.

    Attributes:
        output_ids: the tokens generated so far in this session, ``[batch, length]``, or None.
        output_mask: which of them are no padding, likewise.
        foresight: what is expected to come next.
    """

    def __init__(self, session: Session, max_length: int) -> None:
        self._session, self._loop = session, BackgroundLoop.shared()
        self.max_length = max_length
        self.foresight = Foresight()
        self.output_ids: torch.Tensor | None = None
        self.output_mask: torch.Tensor | None = None
        weakref.finalize(self, _close_later, self._loop, session)

    @property
    def position(self) -> int:
        """Positions that the caches hold. Set it to an earlier one to forget what came after."""
        return self._session.position

    @position.setter
    def position(self, position: int) -> None:
        self._session.roll_back(position)
        if self.output_ids is not None:
            self.output_ids = self.output_ids[:, : position + 1]
        if self.output_mask is not None:
            self.output_mask = self.output_mask[:, : position + 1]

    @property
    def batch(self) -> int:
        """Sequences in the caches."""
        return self._session.batch

    @property
    def recoveries(self) -> list[Recovery]:
        """The servers that were lost and replaced so far."""
        return self._session.recoveries

    @property
    def last_timings(self) -> tuple[HopTiming, ...]:
        """Where the time of the last step went, server by server."""
        return self._session.last_timings

    @property
    def last_step(self) -> StepTiming:
        """The same, with the time of the whole step."""
        return self._session.last_step

    @property
    def standbys(self) -> tuple[Leg, ...]:
        """The servers that could take over at once (``redundancy=2``)."""
        return self._session.standbys

    @property
    def relayed(self) -> tuple[int, ...]:
        """The block boundaries at which hidden states pass through this client, not straight from server to server."""
        return self._session.relayed

    @property
    def taken_ahead(self) -> int:
        """How many steps had been begun before they were asked for (``look_ahead=True``)."""
        return self._session.taken_ahead

    @property
    def ahead_in_vain(self) -> int:
        """How many were begun that nobody asked for."""
        return self._session.ahead_in_vain

    @property
    def route(self) -> tuple[Leg, ...]:
        """The servers in use now."""
        return self._session.route

    def step(
        self,
        hidden_states: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        *,
        wanted: int | None = None,
        on_result: Callable[[torch.Tensor], object] = lambda _: None,
    ) -> torch.Tensor:
        """Run new positions through all blocks; see :meth:`swarm.client.session.Session.step`.

        Args:
            on_result: called with it on the client's own thread when the result has come, before this one goes on.
        """

        async def step() -> torch.Tensor:
            output = await self._session.step(hidden_states, position_ids, mask, wanted=wanted)
            on_result(output)
            return output

        return self._loop.run(step()).to(hidden_states.device)

    def step_ahead(self, hidden_states: torch.Tensor) -> None:
        """(``on_result``) Begin with what :meth:`step` is likely to be given next; see
        :meth:`swarm.client.session.Session.step_ahead`."""
        self._session.step_ahead(hidden_states)

    def reorder(self, rows: torch.Tensor) -> None:
        """Let sequence i go on as what sequence ``rows[i]`` was (beam search)."""
        self._session.reorder(rows)

    def close(self) -> None:
        """Free the caches on the servers."""
        self._loop.run(self._session.close())

    def __enter__(self) -> InferenceSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _close_later(loop: BackgroundLoop, session: Session) -> None:
    loop.submit(session.close())
