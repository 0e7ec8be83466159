"""Watch a live swarm: what its directory says, and whether a client that talks all along notices anything."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from swarm.client import Network
from swarm.dht import Announcement, State
from swarm.models import open_checkpoint

PATIENCE_S = 90.0
"""Much more than it takes: the lease of those who died, a look around, a claim, loading; on a busy machine."""


def until(condition: Callable[[], bool], within_s: float = PATIENCE_S) -> None:
    """Wait for it; fails if it takes too long."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


async def seen_until(
    network: Network, model: str, done: Callable[[Sequence[Announcement]], bool], within_s: float = PATIENCE_S
) -> Sequence[Announcement]:
    """Look at the directory until `done`; fails with what was seen last."""
    digest, deadline = open_checkpoint(model).model_digest, time.monotonic() + within_s
    while not done(servers := await network.servers(digest)):
        if time.monotonic() > deadline:
            seen = "\n".join(f"{one.state} {one.start}:{one.end} {one.throughput:.0f}/s" for one in servers)
            raise AssertionError(f"it did not come to that within {within_s} s; seen last:\n{seen}")
        await asyncio.sleep(0.1)
    return servers


def redundancy(servers: Sequence[Announcement], blocks: int) -> list[int]:
    """How many serve each block."""
    return [sum(one.hosts(block) for one in servers if one.state is State.ONLINE) for block in range(blocks)]


def moves(servers: Sequence[Announcement]) -> int:
    """Made by all of them so far."""
    return sum(one.moves for one in servers)


class Talker(threading.Thread):
    """A client that goes on with one answer, a few tokens at a time, until it is told to stop."""

    def __init__(self, model: Any, ids: Sequence[int] = (5, 9, 33, 71), most: int = 2000) -> None:
        """
        Args:
            ids: the prompt.
            most: tokens, prompt included; it then goes on with nothing.
        """
        super().__init__(daemon=True)
        self._model, self._most, self._enough = model, most, threading.Event()
        self.ids = torch.tensor([ids])
        self.gaps_s: list[float] = []
        """What every few tokens took."""
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            with self._model.inference_session(max_length=self._most + 3) as session:
                inputs: tuple[torch.Tensor, ...] = (self.ids,)
                while not self._enough.wait(0.2) and self.ids.shape[1] < self._most:
                    begun = time.monotonic()
                    new = self._model.generate(
                        *inputs, session=session, do_sample=False, max_new_tokens=3, min_new_tokens=3
                    )
                    self.gaps_s.append(time.monotonic() - begun)
                    self.ids = torch.cat([self.ids, new], dim=1) if not inputs else new
                    inputs = ()
        except BaseException as error:
            self.error = error

    def answer(self) -> torch.Tensor:
        """Stop; what was said, prompt included."""
        self._enough.set()
        self.join(60)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error
        return self.ids
