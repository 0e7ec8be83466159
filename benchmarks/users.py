"""Many users at once: each is a thread with a prompt and a session of its own, all in one process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.streamers import TokenTimes

PROMPTS = (
    "The history of the sea is", "A short list of colours:", "In the year 1890,", "My neighbour has a dog that",
    "The capital of France", "When it rains in autumn,", "The first rule of cooking is", "Mathematics begins with",
    "On the table there was", "Nobody knows why the", "A good bridge must", "The train to the coast",
    "Water boils when", "Every evening the old man", "The opposite of cold", "To build a house you need",
)  # fmt: skip


def exactly(tokens: int, model: Any) -> dict[str, Any]:
    """Options for ``generate()``: greedily so many, because what would end the answer is a token that never comes.

    (``min_new_tokens`` looks at all logits, for 1.5 ms.)
    """
    return {"do_sample": False, "max_new_tokens": tokens, "eos_token_id": model.config.vocab_size}


@dataclass
class User:
    """One of them, and what came of its last answer."""

    prompt: torch.Tensor
    """``[1, length]``"""
    times: TokenTimes = field(default_factory=TokenTimes)
    ids: list[int] = field(default_factory=list)
    """Prompt and answer."""
    prefill_compute_s: float = 0.0
    """What the servers computed for the prompt, all together; of what they computed for several, a part."""

    def generate(self, model: Any, tokens: int, start: threading.Barrier, options: dict[str, Any]) -> None:
        """Answer greedily; begins when all are ready."""
        with model.inference_session(max_length=self.prompt.shape[1] + tokens) as session:

            def note_prefill(token: int) -> None:
                if token == 1:
                    self.prefill_compute_s = sum(hop.compute_share_s for hop in session.last_timings)

            self.times = TokenTimes(note_prefill)
            start.wait()
            ids = model.generate(
                self.prompt,
                session=session,
                streamer=self.times,
                **exactly(tokens, model),
                **options,
            )
        self.ids = ids[0].tolist()


def answer_together(
    model: Any,
    users: Sequence[User],
    tokens: int,
    *,
    meanwhile: Callable[[], object] = lambda: None,
    **options: Any,
) -> None:
    """Let all `users` answer at once, `tokens` each, and wait for them; `meanwhile` runs on this thread.

    Args:
        options: for ``generate()``.
    """
    start = threading.Barrier(len(users) + 1)
    threads = [threading.Thread(target=user.generate, args=(model, tokens, start, options)) for user in users]
    for thread in threads:
        thread.start()
    start.wait()
    meanwhile()
    for thread in threads:
        thread.join()
