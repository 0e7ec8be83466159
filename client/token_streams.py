"""Many streams of tokens in one event loop: what a gateway is built on.

Where :class:`~swarm.client.model.DistributedMixin` lends transformers' ``generate()`` a thread per caller, here each
stream is a coroutine. What is done on this machine (embeddings, norm, head, sampling) happens on one thread, for all
streams that wait for it as one batch.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch

from swarm.client.foresight import Foresight
from swarm.client.network import Network
from swarm.client.remote_layers import RemoteLayers
from swarm.client.sampling import Choice, Sampler, Sampling
from swarm.client.session import Session
from swarm.client.timing import StepTiming
from swarm.errors import SwarmError
from swarm.models import Checkpoint, load_shell
from swarm.models.batched_head import BatchedHead
from swarm.models.shortcut import shortcut_of
from swarm.protocol.tensors import dtype_name

_MOST_TOGETHER = 32

T = TypeVar("T")


@dataclass(frozen=True)
class Token:
    """One generated token."""

    choice: Choice
    timing: StepTiming
    """Of the step that it came from."""
    recoveries: int
    """Servers that were lost and replaced in this stream so far."""


@dataclass(frozen=True)
class _Turn:
    """What a stream wants of this machine: choose a token after `output`, then what enters block 0 for it."""

    output: torch.Tensor
    """``[1, 1, hidden]`` as it left the last block."""
    sampler: Sampler
    position: int
    """Of the token that is to be chosen."""


@dataclass(frozen=True)
class _Turned:
    choice: Choice
    likeliest: int | None
    """The token to which the model gave most; of several streams at once nobody asks: None."""
    hidden_states: torch.Tensor
    """``[1, 1, hidden]``, to enter block 0."""


class TokenStreams:
    """A model of the swarm, for any number of streams at once. All methods belong to one event loop.

    Attributes:
        context: how many positions the model was made for, or None if its configuration does not say.
        stop_tokens: those that end a text.
    """

    def __init__(
        self, network: Network, checkpoint: Checkpoint, *, device: torch.device | str = "cpu", quantized: bool = False
    ) -> None:
        """Load embeddings, norm and head: takes seconds, call it from a thread.

        Args:
            device: where they are to be.
            quantized: the network's servers have quantized weights, so the head may have, too.

        Raises:
            CorruptCheckpoint: they cannot be loaded.
        """
        self.checkpoint = checkpoint
        self._network = network
        self._layers = RemoteLayers()
        self._shell = load_shell(
            checkpoint,
            self._layers,
            dtype=checkpoint.default_dtype,
            device=device,
            quantized_layers=quantized,
            looks_ahead=True,
        )
        self._decoder = self._shell.base_model
        self._takes_positions = "position_ids" in inspect.signature(self._decoder.forward).parameters
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="swarm-head")
        self._waiting: list[tuple[_Turn, asyncio.Future[_Turned]]] = []
        self._working: asyncio.Task[None] | None = None
        self._streams = 0
        self.context: int | None = getattr(checkpoint.config, "max_position_embeddings", None)
        self.stop_tokens = _stop_tokens(self._shell.generation_config.eos_token_id, checkpoint)

    async def generate(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        max_new_tokens: int,
        *,
        top_logprobs: int | None = None,
        stop_tokens: frozenset[int] | None = None,
    ) -> AsyncGenerator[Token, None]:
        """Tokens that follow `prompt` (one or more token ids), up to the first that ends a text, that one included.

        Close it (``contextlib.aclosing``) to free what it holds on servers.

        Args:
            top_logprobs: report probabilities, and so many of the likeliest tokens.
            stop_tokens: which end the text; default: the model's own.

        Raises:
            NoRoute, NoRoom, ExpertsMissing: see :meth:`swarm.client.session.Session.step`.
            ServerFault: what servers computed are no numbers.
        """
        stops = self.stop_tokens if stop_tokens is None else stop_tokens
        ids = torch.tensor([list(prompt)])
        sampler = Sampler(sampling, ids, top_logprobs)
        dtype = dtype_name(self._shell.dtype)
        session, foresight = self._network.session(self.checkpoint, dtype, ids.shape[1] + max_new_tokens), Foresight()
        self._streams += 1
        try:
            hidden_states = await self._on_thread(self._entering, ids, torch.arange(ids.shape[1]).unsqueeze(0))
            for left in reversed(range(max_new_tokens)):
                output = await session.step(hidden_states, wanted=1)
                if left and foresight.is_trusted:
                    await self._look_ahead(session, foresight, output, stops)
                turned = await self._take_turn(_Turn(output, sampler, session.position))
                if not foresight.is_trusted and turned.likeliest is not None:
                    foresight.expect(turned.likeliest)
                foresight.chosen(turned.choice.token)
                yield Token(turned.choice, session.last_step, len(session.recoveries))
                if turned.choice.token in stops:
                    return
                hidden_states = turned.hidden_states
        finally:
            self._streams -= 1
            await session.close()

    async def embed(self, prompt: Sequence[int]) -> torch.Tensor:
        """The ``[positions, hidden]`` states after the final norm. Raises what :meth:`generate` raises."""
        ids = torch.tensor([list(prompt)])
        session = self._network.session(self.checkpoint, dtype_name(self._shell.dtype), ids.shape[1])
        try:
            positions = torch.arange(ids.shape[1]).unsqueeze(0)
            output = await session.step(await self._on_thread(self._entering, ids, positions))
            return (await self._on_thread(self._normed, output))[0]
        finally:
            await session.close()

    async def close(self) -> None:
        """End the thread; streams must have ended before."""
        if self._working is not None:
            self._working.cancel()
            await asyncio.gather(self._working, return_exceptions=True)
        self._thread.shutdown(wait=False)

    async def _on_thread(self, function: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def _look_ahead(
        self, session: Session, foresight: Foresight, output: torch.Tensor, stops: frozenset[int]
    ) -> None:
        """Let servers begin with what is likeliest to follow `output`, if nobody else keeps this machine busy."""
        head, shortcut = self._shell.get_output_embeddings(), shortcut_of(self._shell)
        if self._streams > 1 or shortcut is None or not (isinstance(head, BatchedHead) and head.looks_ahead):
            return
        token, hidden_states = await self._on_thread(shortcut.likeliest_after, self._shell, output)
        if token not in stops and foresight.expect(token):
            session.step_ahead(hidden_states)

    async def _take_turn(self, turn: _Turn) -> _Turned:
        future: asyncio.Future[_Turned] = asyncio.get_running_loop().create_future()
        self._waiting.append((turn, future))
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        """Run what waits, all together, until nothing waits; others come meanwhile."""
        while self._waiting:
            batch, self._waiting = self._waiting[:_MOST_TOGETHER], self._waiting[_MOST_TOGETHER:]
            batch = [(turn, future) for turn, future in batch if not future.done()]  # a stream may have been closed
            if not batch:
                continue
            try:
                results = await self._on_thread(self._turned, [turn for turn, _ in batch])
            except Exception as error:  # the device's: it is for those who wait to say what that means
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), result in zip(batch, results, strict=True):
                if future.done():
                    continue
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)

    # --- on the thread

    def _turned(self, turns: list[_Turn]) -> list[_Turned | Exception]:
        """What each gets, or what its own sampler raised."""
        logits = self._leaving(torch.cat([turn.output for turn in turns]).to(self._shell.device))
        choices: list[Choice | Exception] = []
        for turn, row in zip(turns, logits, strict=True):
            try:
                choices.append(turn.sampler.choose(row))
            except (SwarmError, RuntimeError, ValueError, IndexError) as error:
                choices.append(error)
        likeliest = int(logits.argmax()) if len(turns) == 1 else None
        tokens = torch.tensor([[choice.token if isinstance(choice, Choice) else 0] for choice in choices])
        entering = self._entering(tokens, torch.tensor([[turn.position] for turn in turns])).unsqueeze(1)
        return [
            _Turned(choice, likeliest, hidden_states) if isinstance(choice, Choice) else choice
            for choice, hidden_states in zip(choices, entering, strict=True)
        ]

    @torch.no_grad()
    def _entering(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """``[batch, n, hidden]`` that enter block 0 for tokens at positions, both ``[batch, n]``."""
        device, shortcut = self._shell.device, shortcut_of(self._shell)
        if shortcut is not None:
            return shortcut.embed(self._shell, ids.to(device))
        where = {"position_ids": positions.to(device)} if self._takes_positions else {}
        entered: list[torch.Tensor] = []

        def keep(hidden_states: torch.Tensor) -> torch.Tensor:
            entered.append(hidden_states)
            return hidden_states

        with self._layers.running(keep):
            self._decoder(ids.to(device), use_cache=False, **where)
        return entered[0]

    @torch.no_grad()
    def _leaving(self, output: torch.Tensor) -> torch.Tensor:
        """``[batch, vocabulary]`` logits of what left the last block, ``[batch, 1, hidden]``."""
        ids = output.new_zeros(output.shape[:2], dtype=torch.int64)
        with self._layers.running(lambda _: output):
            logits: torch.Tensor = self._shell(ids, use_cache=False).logits
        return logits[:, -1]

    @torch.no_grad()
    def _normed(self, output: torch.Tensor) -> torch.Tensor:
        output = output.to(self._shell.device)
        ids = output.new_zeros(output.shape[:2], dtype=torch.int64)
        with self._layers.running(lambda _: output):
            normed: torch.Tensor = self._decoder(ids, use_cache=False).last_hidden_state
        return normed


def _stop_tokens(configured: int | list[int] | None, checkpoint: Checkpoint) -> frozenset[int]:
    """What the generation configuration names, else what the tokenizer does."""
    if configured is None:
        configured = checkpoint.tokenizer().eos_token_id
    if configured is None:
        return frozenset()
    return frozenset([configured] if isinstance(configured, int) else configured)
