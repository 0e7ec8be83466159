"""Serve expert streams: compute hosted experts for the hidden states that servers of blocks send."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from swarm.errors import BlocksNotHosted, Draining, ProtocolError, RemoteError, ServerFault, WrongModel
from swarm.models.experts import HostedExperts
from swarm.protocol.messages import (
    MAX_EXPERT_CALLS,
    MAX_STEP_POSITIONS,
    ComputeExperts,
    ExpertOutputs,
    ExpertsOpened,
    Message,
    OpenExperts,
    Refusal,
)
from swarm.protocol.tensors import dtype_name
from swarm.protocol.wire import Wire
from swarm.server.compute import ComputeThread
from swarm.server.experts.asked import Asked
from swarm.server.schedule import Waiting
from swarm.transport.outgoing import write

logger = logging.getLogger(__name__)

_READ_BYTES = 256 * 1024
_WRITE_TIMEOUT_S = 30.0
_IDLE_TIMEOUT_S = 60.0
_FAILURES = (OSError, TimeoutError)


@dataclass
class Contribution:
    """What a server has done for others since it started."""

    calls: int = 0
    tokens: int = 0
    """Experts computed, a token each."""
    received_bytes: int = 0
    sent_bytes: int = 0
    """Of tensors; messages have some hundred bytes more."""


@dataclass(frozen=True)
class _Call:
    hosted: HostedExperts
    hidden_states: torch.Tensor
    """``[n, hidden]``, a row for each expert."""
    experts: torch.Tensor


class ExpertStreams:
    """Accepts expert streams. Calls for the same block that wait at the same time are computed as one.

    Attributes:
        calls_under_way: on all streams.
        draining: new streams are refused; those that stand go on until their owners have left.
        contribution: what it has done so far.
        asked: for which experts it is asked how often.
    """

    def __init__(
        self, hosted: Mapping[int, HostedExperts], model: str, hidden_size: int, dtype: torch.dtype,
        compute: ComputeThread,
    ) -> None:  # fmt: skip
        self._hosted, self._model, self._hidden_size, self._dtype = dict(hosted), model, hidden_size, dtype
        self._compute = compute
        self.calls_under_way = 0
        self.draining = False
        self.contribution = Contribution()
        self.asked = Asked({block: experts.kept for block, experts in hosted.items()}, time.monotonic())

    def host(self, block: int, hosted: HostedExperts | None) -> None:
        """From now on these experts of `block`, and no others; calls under way still get those that they asked for."""
        self._hosted.pop(block, None)
        if hosted is not None:
            self._hosted[block] = hosted
        self.asked.host(block, hosted.kept if hosted is not None else ())

    async def handle(self, peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve a stream until its end; who breaks the protocol loses this stream only."""
        stream = _Stream(self, reader, writer)
        try:
            await stream.serve()
        except* ProtocolError as errors:
            logger.warning("closed a stream of %s: %s", peer_id, errors.exceptions[0])
        except* _FAILURES:
            logger.info("%s vanished", peer_id)

    def check(self, request: OpenExperts) -> None:
        """Raises Draining or WrongModel if it is to be refused."""
        if self.draining:
            raise Draining("this server is leaving")
        if request.model != self._model:
            raise WrongModel(
                f"this server hosts experts of {self._model[:16]}…, asked for were those of {request.model[:16]}…"
            )

    @property
    def dtype(self) -> str:
        """In which hidden states travel."""
        return dtype_name(self._dtype)

    async def compute(self, request: ComputeExperts, tensors: Mapping[str, torch.Tensor]) -> ExpertOutputsOf:
        """The answer to a call.

        Raises:
            BlocksNotHosted, ServerFault: it cannot be computed.
            ProtocolError: it makes no sense.
        """
        call = self._checked(request, tensors)
        waiting = Waiting(len(call.experts), group=("experts", request.block))
        self.calls_under_way += 1
        try:
            outputs, spent = await self._compute.run_with_others(call, _compute_together, waiting)
        except (RuntimeError, ValueError, IndexError, MemoryError) as error:
            logger.exception("a call failed")
            raise ServerFault(
                f"the computation failed: {str(error).splitlines()[0] if str(error) else error!r}"
            ) from error
        finally:
            self.calls_under_way -= 1
        answer = ExpertOutputs(call=request.call, queue_s=spent.queue_s, compute_s=spent.compute_s, tensors=[])
        self.contribution.calls += 1
        self.contribution.tokens += len(call.experts)
        self.asked.count(request.block, call.experts.numpy(), time.monotonic())
        self.contribution.received_bytes += sum(tensor.nbytes for tensor in tensors.values())
        self.contribution.sent_bytes += outputs.nbytes
        return answer, {"outputs": outputs}

    def _checked(self, request: ComputeExperts, tensors: Mapping[str, torch.Tensor]) -> _Call:
        if set(tensors) != {"hidden_states", "tokens", "experts"}:
            raise ProtocolError("a call carries other tensors than hidden_states, tokens and experts")
        states, tokens, experts = tensors["hidden_states"], tensors["tokens"], tensors["experts"]
        if states.dim() != 2 or states.shape[1] != self._hidden_size or states.dtype != self._dtype:
            raise ProtocolError(f"hidden states are {list(states.shape)} {states.dtype}, not [n, {self._hidden_size}]")
        if (
            tokens.dtype != torch.int64
            or experts.dtype != torch.int64
            or tokens.shape != experts.shape
            or tokens.dim() != 1
        ):
            raise ProtocolError("tokens and experts must be as many whole numbers")
        if not 1 <= len(tokens) <= MAX_STEP_POSITIONS or int(tokens.min()) < 0 or int(tokens.max()) >= len(states):
            raise ProtocolError("a call names no token, too many, or one that is not there")
        hosted = self._hosted.get(request.block)
        if hosted is None or not set(experts.tolist()) <= set(hosted.kept):
            raise BlocksNotHosted(f"this server does not host all of these experts of block {request.block}")
        return _Call(hosted, states[tokens], experts)


ExpertOutputsOf = tuple[ExpertOutputs, dict[str, torch.Tensor]]


def _compute_together(calls: Sequence[_Call]) -> list[torch.Tensor]:
    """Compute calls for the same block as one. Called on the compute thread only."""
    hosted = calls[0].hosted
    device = next(hosted.module.parameters()).device
    outputs = hosted.compute(
        torch.cat([call.hidden_states for call in calls]).to(device),
        torch.cat([call.experts for call in calls]).to(device),
    )
    return list(torch.split(outputs.to("cpu"), [len(call.experts) for call in calls]))


class _Stream:
    """One server's stream."""

    def __init__(self, server: ExpertStreams, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._server, self._reader, self._writer = server, reader, writer
        self._wire = Wire()
        self._opened = False
        self._calls: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            await self._flush()
            while True:
                async with asyncio.timeout(_IDLE_TIMEOUT_S):
                    data = await self._reader.read(_READ_BYTES)
                if not data:
                    break
                for message, tensors in self._wire.receive(data):
                    if not self._opened:
                        if not self._open(message):
                            return
                    elif isinstance(message, ComputeExperts):
                        self._call(tasks, message, tensors)
                    else:
                        raise ProtocolError(f"unexpected message {message.type!r} on an expert stream")
                await self._flush()
            for task in self._calls:
                task.cancel()

    def _open(self, message: Message) -> bool:
        if not isinstance(message, OpenExperts):
            raise ProtocolError(f"unexpected message {message.type!r} before an expert stream was opened")
        try:
            self._server.check(message)
        except RemoteError as error:
            self._refuse(error)
            return False
        self._opened = True
        self._wire.send(ExpertsOpened(dtype=self._server.dtype))
        return True

    def _call(self, tasks: asyncio.TaskGroup, message: ComputeExperts, tensors: dict[str, torch.Tensor]) -> None:
        if len(self._calls) >= MAX_EXPERT_CALLS:
            raise ProtocolError(f"more than {MAX_EXPERT_CALLS} calls under way on one stream")
        task = tasks.create_task(self._answer(message, tensors))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def _answer(self, message: ComputeExperts, tensors: dict[str, torch.Tensor]) -> None:
        try:
            answer, outputs = await self._server.compute(message, tensors)
        except RemoteError as error:
            self._refuse(error)
            self._writer.close()
            return
        self._wire.send(answer, outputs)
        await self._flush()

    def _refuse(self, error: RemoteError) -> None:
        self._wire.send(Refusal(code=error.code, reason=str(error)[:2000]))
        with contextlib.suppress(OSError):
            write(self._writer, self._wire.take_outgoing())

    async def _flush(self) -> None:
        write(self._writer, self._wire.take_outgoing())
        async with asyncio.timeout(_WRITE_TIMEOUT_S):
            await self._writer.drain()
