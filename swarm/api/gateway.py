"""The gateway itself, whatever dialect it is spoken to in: models, callers, the queue, and many answers at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request

from swarm.api.failures import failure_of, too_many, unknown_model, wrong_key
from swarm.api.keys import Caller, Callers
from swarm.api.metrics import Metrics
from swarm.api.queue import Queue, QueueFull
from swarm.api.served_model import Finish, Part, ServedModel, Wanted
from swarm.errors import SwarmError

MOST_ANSWERS = 16
"""In one request."""

T = TypeVar("T")


class Gateway:
    """Answers requests with the swarm's models.

    Attributes:
        models: by the names that callers use.
        metrics: what happened so far.
    """

    def __init__(self, models: Sequence[ServedModel], callers: Callers, queue: Queue) -> None:
        self.models = {model.name: model for model in models}
        self.metrics = Metrics()
        self._callers, self._queue = callers, queue

    @property
    def load(self) -> tuple[int, int]:
        """Requests that are being answered, and that wait."""
        return self._queue.running, self._queue.waiting

    def caller(self, request: Request) -> Caller:
        """Who asks, for one more request. Raises RequestFailed if they may not."""
        now = time.monotonic()
        caller = self._callers.caller(_secret(request), request.client.host if request.client else "", now)
        if caller is None:
            raise wrong_key()
        if wait_s := caller.wait_s(now):
            raise too_many(wait_s)
        if caller.requests is not None:
            caller.requests.take(1, now)
        return caller

    def check_key(self, request: Request) -> None:
        """For what costs nothing: the key must be right, but no allowance is taken. Raises RequestFailed."""
        if self._callers.needs_key and self._callers.caller(_secret(request), "", time.monotonic()) is None:
            raise wrong_key()

    def model(self, name: str) -> ServedModel:
        """The model of that name. Raises RequestFailed."""
        if name not in self.models:
            raise unknown_model(name, list(self.models))
        return self.models[name]

    async def answers(
        self, model: ServedModel, wanted: Sequence[Wanted], caller: Caller
    ) -> AsyncGenerator[tuple[int, Part], None]:
        """The parts of one answer to each of `wanted`, as they come, with the answer's number.

        Closing it frees everything at once.

        Raises:
            RequestFailed: it cannot be answered (any more).
        """
        begun, first = time.monotonic(), True
        try:
            async with self._queue.place(caller.name):
                self._take_tokens(caller, sum(len(one.prompt) for one in wanted))
                self.metrics.prompt_tokens += sum(len(one.prompt) for one in wanted)
                async with aclosing(_merged(model, wanted)) as parts:
                    async for number, part in parts:
                        if first:
                            self.metrics.first_token_s.note(time.monotonic() - begun)
                            first = False
                        self._take_tokens(caller, 1)
                        self.metrics.new_tokens += 1
                        yield number, part
        except (SwarmError, QueueFull) as error:
            raise failure_of(error) from error

    async def alone(self, work: Coroutine[Any, Any, T], caller: Caller) -> T:
        """Run `work` in a place of the queue. Raises RequestFailed."""
        try:
            async with self._queue.place(caller.name):
                return await work
        except (SwarmError, QueueFull) as error:
            raise failure_of(error) from error
        finally:
            work.close()

    def _take_tokens(self, caller: Caller, count: int) -> None:
        if caller.tokens is not None:
            caller.tokens.take(count, time.monotonic())


async def joined(answers: AsyncGenerator[tuple[int, Part], None]) -> tuple[str, int, Finish | None]:
    """Of a single answer, once it is complete: its text, how many tokens it took, and how it ended."""
    text, count, finish = "", 0, None
    async with aclosing(answers):
        async for _, part in answers:
            text, count, finish = text + part.text, count + 1, part.finish
    return text, count, finish


def _secret(request: Request) -> str | None:
    """The API key, where OpenAI's clients put it, or Anthropic's."""
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    return (secret if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")).strip() or None


async def _merged(model: ServedModel, wanted: Sequence[Wanted]) -> AsyncGenerator[tuple[int, Part], None]:
    """All answers at the same time; the first that fails ends all."""
    arrived: asyncio.Queue[tuple[int, Part | Exception | None]] = asyncio.Queue(maxsize=4 * len(wanted))

    async def run(number: int, one: Wanted) -> None:
        try:
            async with aclosing(model.answer(one)) as parts:
                async for part in parts:
                    await arrived.put((number, part))
            await arrived.put((number, None))
        except Exception as error:  # raised below, where it is waited for
            await arrived.put((number, error))

    tasks = [asyncio.create_task(run(number, one)) for number, one in enumerate(wanted)]
    try:
        left = len(tasks)
        while left:
            number, part = await arrived.get()
            if isinstance(part, Exception):
                raise part
            if part is None:
                left -= 1
            else:
                yield number, part
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
