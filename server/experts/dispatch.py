"""Have experts computed by the servers that host them, for blocks that are run here.

The thread that computes blocks waits (:meth:`ExpertDispatch.begin`); everything else happens in the event loop. A
stream to every server of experts stands ahead of time; what is late is asked of a second server besides, and what a
server failed to do of another one at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import nn

from swarm.dht import Directory, ExpertAnnouncement, State
from swarm.errors import ExpertsMissing, PeerError, ProtocolError, RemoteError, SwarmError
from swarm.models.experts import routed_experts
from swarm.protocol.messages import (
    EXPERTS_PROTOCOL,
    MAX_STEP_POSITIONS,
    ComputeExperts,
    ExpertOutputs,
    ExpertsOpened,
    Message,
    OpenExperts,
    Refusal,
)
from swarm.protocol.tensors import dtype_name
from swarm.routing.experts import ExpertChoice
from swarm.server.experts.gathering import Ask, Gathering, Latencies
from swarm.transport.node import Node
from swarm.transport.watched_stream import WatchedStream

logger = logging.getLogger(__name__)

_REFRESH_S = 4.0
_REFRESH_IN_NEED_S = 0.25
_RETRY_AFTER_S = 1.0
"""A server of experts that failed is dialled again after so long."""
_MAX_CALL_BYTES = 32 * 1024**2
_LONGEST_S = 120.0


class ExpertDispatch:
    """The experts of one model that are elsewhere."""

    def __init__(
        self,
        node: Node,
        directory: Directory,
        model: str,
        hidden_size: int,
        dtype: torch.dtype,
        on_waited: Callable[[float], None],
    ) -> None:
        """Called in the event loop.

        Args:
            on_waited: called on the thread that computes, with the seconds for which it waited.
        """
        self._node, self._directory, self._model = node, directory, model
        self._dtype, self._on_waited = dtype_name(dtype), on_waited
        self._rows_per_call = max(1, min(MAX_STEP_POSITIONS, _MAX_CALL_BYTES // (hidden_size * dtype.itemsize)))
        self._loop = asyncio.get_running_loop()
        self._tasks: asyncio.TaskGroup | None = None
        self._hosts: dict[str, _Host] = {}
        self._failed_at: dict[str, float] = {}
        self._calls: set[_Call] = set()
        self._changed = asyncio.Event()
        self._last_refresh = float("-inf")

    # --- for the thread that computes

    def begin(
        self, block: int, hidden_states: torch.Tensor, tokens: torch.Tensor, experts: torch.Tensor
    ) -> Callable[[], torch.Tensor]:
        """See :class:`swarm.models.experts.Elsewhere`."""
        states, tokens, experts = hidden_states.detach().to("cpu"), tokens.to("cpu"), experts.to("cpu")
        pieces = [slice(begin, begin + self._rows_per_call) for begin in range(0, len(tokens), self._rows_per_call)]
        calls = [_Call(self, block, states, tokens[piece], experts[piece]) for piece in pieces]
        for call in calls:
            self._loop.call_soon_threadsafe(call.start)

        def finish() -> torch.Tensor:
            begun = time.perf_counter()
            try:
                return torch.cat([call.future.result(_LONGEST_S) for call in calls])
            except TimeoutError:
                raise RuntimeError(f"servers of experts did not answer within {_LONGEST_S:.0f} s") from None
            finally:
                self._on_waited(time.perf_counter() - begun)

        return finish

    # --- in the event loop

    async def run(self) -> None:
        """Keep in touch with all servers of experts, for ever."""
        try:
            async with asyncio.TaskGroup() as self._tasks:
                while True:
                    await self._refresh(_REFRESH_S / 2)
                    await asyncio.sleep(_REFRESH_S)
        finally:
            self._tasks = None
            for call in list(self._calls):
                call.give_up()

    async def appear(self, block: int, experts: Iterable[int], within_s: float) -> bool:
        """Wait until servers that host these can be reached, or `within_s` has passed; whether they can."""
        wanted, until = frozenset(experts), self._loop.time() + within_s
        while not wanted <= self._reachable(block):
            left_s = until - self._loop.time()
            if left_s <= 0:
                return False
            self._changed.clear()
            await self._refresh(_REFRESH_IN_NEED_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left_s, _REFRESH_IN_NEED_S)):
                    await self._changed.wait()
        return True

    @property
    def usual_s(self) -> float:
        """How long a block waits for experts, usually: as long as for the slowest of all that it asks at once."""
        return max((host.usual_s for host in self._hosts.values() if host.is_open), default=0.0)

    def missing(self, layers: Sequence[nn.Module]) -> dict[int, frozenset[int]]:
        """By block, the experts of these layers that are neither here nor can be reached."""
        return {
            routed.block: frozenset(range(routed.count)) - frozenset(routed.kept) - self._reachable(routed.block)
            for routed in routed_experts(layers)
        }

    def choices(self, block: int) -> list[ExpertChoice]:
        """Who can be asked for experts of `block` now."""
        return [
            ExpertChoice(host.peer_id, host.experts[block], host.usual_s)
            for host in self._hosts.values()
            if host.is_open and block in host.experts
        ]

    def send(self, call: _Call, ask: Ask) -> None:
        """Ask for a part of `call`; it is told what comes of it."""
        host = self._hosts.get(ask.peer_id)
        if host is None or not host.is_open:
            call.failed(ask)
        else:
            host.send(call, ask)

    def began(self, call: _Call) -> None:
        """A call is under way."""
        self._calls.add(call)

    def ended(self, call: _Call) -> None:
        """A call is no longer under way."""
        self._calls.discard(call)

    def _reachable(self, block: int) -> frozenset[int]:
        return frozenset().union(*(choice.experts for choice in self.choices(block)))

    async def _refresh(self, max_age_s: float) -> None:
        now = self._loop.time()
        if now - self._last_refresh < max_age_s:
            return
        self._last_refresh = now
        try:
            found = await self._directory.experts(self._model)
        except SwarmError as error:
            logger.warning("could not look for servers of experts: %s", error)
            return
        there = {one.peer_id: one for one in found if one.state in (State.ONLINE, State.DRAINING)}
        self._failed_at = {peer_id: at for peer_id, at in self._failed_at.items() if peer_id in there}
        for peer_id in {one.peer_id for one in found if one.state is State.JOINING} & self._hosts.keys():
            self._hosts[peer_id].experts = {}  # it has given up what it hosted
        for peer_id, announcement in there.items():
            if announcement.dtype != self._dtype:
                continue
            if peer_id in self._hosts:
                self._hosts[peer_id].experts = announcement.experts
            elif now - self._failed_at.get(peer_id, float("-inf")) >= _RETRY_AFTER_S:
                self._dial(announcement)

    def _dial(self, announcement: ExpertAnnouncement) -> None:
        peer_id = announcement.peer_id
        stream = WatchedStream(self._node, peer_id, announcement.addresses, EXPERTS_PROTOCOL)
        stream.send(OpenExperts(model=self._model))
        host = _Host(peer_id, announcement.experts, stream)
        if self._tasks is not None:
            self._hosts[peer_id] = host
            self._tasks.create_task(self._keep(host))

    async def _keep(self, host: _Host) -> None:
        try:
            await host.run(self._changed)
        except (PeerError, RemoteError) as error:
            logger.info("lost %s, a server of experts: %s", host.peer_id, error)
        finally:
            self._failed_at[host.peer_id] = self._loop.time()
            del self._hosts[host.peer_id]
            host.fail_all()


@dataclass(eq=False)
class _Asked:
    call: _Call
    ask: Ask
    rows: torch.Tensor
    sent_at: float


@dataclass(eq=False)
class _Host:
    """A server of experts, and the stream to it."""

    peer_id: str
    experts: dict[int, frozenset[int]]
    stream: WatchedStream
    latencies: Latencies = field(default_factory=Latencies)
    is_open: bool = False
    _asked: dict[int, _Asked] = field(default_factory=dict)
    _last_call: int = 0

    @property
    def usual_s(self) -> float:
        """How long it takes to answer; if it has not been asked, a round trip."""
        return self.latencies.usual_s or 2 * (self.stream.one_way_s or 0.0)

    def send(self, call: _Call, ask: Ask) -> None:
        self._last_call += 1
        rows = call.rows_of(ask.experts)
        tokens, places = torch.unique(call.tokens[rows], return_inverse=True)
        tensors = {"hidden_states": call.hidden_states[tokens], "tokens": places, "experts": call.experts[rows]}
        self._asked[self._last_call] = _Asked(call, ask, rows, time.perf_counter())
        self.stream.expecting = True
        self.stream.send(ComputeExperts(call=self._last_call, block=call.block, tensors=[]), tensors)
        call.expect(ask, self.latencies.late_after_s(len(rows)))

    async def run(self, changed: asyncio.Event) -> None:
        """Until the stream fails, which is raised."""

        def heard(message: Message, tensors: dict[str, torch.Tensor]) -> None:
            match message:
                case ExpertsOpened():
                    self.is_open = True
                    changed.set()
                case ExpertOutputs(call=number):
                    self._answered(number, tensors)
                case Refusal():
                    raise RemoteError(message.reason)
                case _:
                    raise ProtocolError(f"unexpected message {message.type!r} on an expert stream")

        await self.stream.run(heard)

    def fail_all(self) -> None:
        """No answer will come any more."""
        asked, self._asked, self.is_open = list(self._asked.values()), {}, False
        for one in asked:
            one.call.failed(one.ask)

    def _answered(self, number: int, tensors: dict[str, torch.Tensor]) -> None:
        asked = self._asked.pop(number, None)
        if asked is None:
            raise ProtocolError("an answer to a call that was not made")
        self.stream.expecting = bool(self._asked)
        self.latencies.add(len(asked.rows), time.perf_counter() - asked.sent_at)
        outputs, states = tensors.get("outputs"), asked.call.hidden_states
        if outputs is None or outputs.shape != (len(asked.rows), states.shape[1]) or outputs.dtype != states.dtype:
            asked.call.failed(asked.ask)
            raise ProtocolError("an answer has another shape or type than was asked for")
        asked.call.answered(asked.ask, asked.rows, outputs)


class _Call:
    """What one block needs for some tokens, gathered. All but the making happens in the event loop."""

    def __init__(
        self,
        dispatch: ExpertDispatch,
        block: int,
        hidden_states: torch.Tensor,
        tokens: torch.Tensor,
        experts: torch.Tensor,
    ) -> None:
        self.block, self.hidden_states, self.tokens, self.experts = block, hidden_states, tokens, experts
        self.future: Future[torch.Tensor] = Future()
        self._dispatch = dispatch
        self._gathering = Gathering(experts.tolist())
        self._outputs: torch.Tensor | None = None
        self._timers: list[asyncio.TimerHandle] = []

    def start(self) -> None:
        """Ask for everything."""
        # Here and not where it was made, in inference mode: only there could it be written to.
        self._outputs = torch.empty(len(self.experts), self.hidden_states.shape[1], dtype=self.hidden_states.dtype)
        self._dispatch.began(self)
        self._ask(self._gathering.ask(self._dispatch.choices(self.block)))

    def rows_of(self, experts: frozenset[int]) -> torch.Tensor:
        """The indices of what these experts are to compute."""
        return torch.isin(self.experts, torch.tensor(sorted(experts))).nonzero().flatten()

    def expect(self, ask: Ask, within_s: float) -> None:
        """If no answer has come by then, ask somebody else besides."""
        self._timers.append(asyncio.get_running_loop().call_later(within_s, self._late, ask))

    def answered(self, ask: Ask, rows: torch.Tensor, outputs: torch.Tensor) -> None:
        """An answer: ``[len(rows), hidden]``."""
        if self.future.done():
            return  # somebody else was faster
        assert self._outputs is not None
        new = self._gathering.answered(ask)
        if new == ask.experts:
            self._outputs[rows] = outputs
        elif new:
            kept = torch.isin(self.experts[rows], torch.tensor(sorted(new)))
            self._outputs[rows[kept]] = outputs[kept]
        if self._gathering.is_complete:
            self._end()
            self.future.set_result(self._outputs)

    def failed(self, ask: Ask) -> None:
        """Ask others instead."""
        self._gathering.failed(ask)
        if not self.future.done():
            self._ask(self._gathering.ask(self._dispatch.choices(self.block)))

    def give_up(self) -> None:
        """Nobody will be asked any more."""
        if not self.future.done():
            self._end()
            self.future.set_exception(RuntimeError("this server has stopped asking for experts"))

    def _late(self, ask: Ask) -> None:
        if not self.future.done():
            self._ask(self._gathering.late(ask, self._dispatch.choices(self.block)))

    def _ask(self, asks: list[Ask]) -> None:
        for ask in asks:
            self._dispatch.send(self, ask)
        if (missing := self._gathering.hopeless) and not self.future.done():
            self._end()
            self.future.set_exception(ExpertsMissing.of(self.block, missing))

    def _end(self) -> None:
        self._dispatch.ended(self)
        for timer in self._timers:
            timer.cancel()
