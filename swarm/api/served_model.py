"""A model as the gateway serves it: text in, text out."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError

from swarm.api.failures import bad_request
from swarm.api.text_pieces import TextPieces
from swarm.client import Sampling, Token, TokenStreams

DEFAULT_MAX_NEW_TOKENS = 1024
"""Where the caller names none: what a session may grow to is reserved for it on every server."""


@dataclass(frozen=True)
class Wanted:
    """One answer to a prompt."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    """Report probabilities, and so many of the likeliest tokens."""


@dataclass(frozen=True)
class Finish:
    """How an answer ended."""

    reason: str
    """``"end"``: the model ended it, ``"stop"``: a stop sequence, ``"length"``: the limit."""
    stop: str | None = None
    """Which stop sequence."""


@dataclass(frozen=True)
class Part:
    """What one token added to an answer."""

    text: str
    """May be empty."""
    token: Token
    finish: Finish | None
    """With the last part."""


class ServedModel:
    """A model under the name by which callers ask for it."""

    def __init__(self, name: str, streams: TokenStreams) -> None:
        self.name, self.streams = name, streams
        self.tokenizer = streams.checkpoint.tokenizer()
        self.since = int(time.time())

    def chat_prompt(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None) -> list[int]:
        """The prompt of a conversation that the model is to continue. Raises RequestFailed."""
        if self.tokenizer.chat_template is None:
            raise bad_request(f"{self.name} has no chat template; use /v1/completions", "no_chat_template")
        try:
            ids: list[int] = self.tokenizer.apply_chat_template(
                list(messages), tools=list(tools) if tools else None, add_generation_prompt=True, return_dict=False
            )
        except (TemplateError, TypeError, KeyError, ValueError, AttributeError) as error:
            raise bad_request(f"{self.name}'s chat template refuses these messages: {error}") from error
        return ids

    def text_prompt(self, text: str) -> list[int]:
        """The tokens of `text`."""
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids

    def wanted(self, prompt: Sequence[int], max_new_tokens: int | None, **options: Any) -> Wanted:
        """A checked request. Raises RequestFailed."""
        context = self.streams.context
        vocabulary = self.streams.checkpoint.config.get_text_config().vocab_size
        if not prompt:
            raise bad_request("the prompt is empty")
        if not all(0 <= token < vocabulary for token in prompt):
            raise bad_request(f"the prompt has token ids outside of the vocabulary of {vocabulary}")
        if context is not None and len(prompt) >= context:
            raise bad_request(
                f"This model's context is {context} tokens, and the prompt has {len(prompt)}: shorten it.",
                "context_length_exceeded",
            )
        room = context - len(prompt) if context is not None else DEFAULT_MAX_NEW_TOKENS
        wanted = Wanted(tuple(prompt), max_new_tokens=min(max_new_tokens or DEFAULT_MAX_NEW_TOKENS, room), **options)
        if any(not 0 <= token < vocabulary for token in wanted.sampling.logit_bias):
            raise bad_request(f"logit_bias has token ids outside of the vocabulary of {vocabulary}")
        return wanted

    async def answer(self, wanted: Wanted) -> AsyncGenerator[Part, None]:
        """The parts of an answer, as they come; close it to free what it holds. Raises SwarmError."""
        pieces = TextPieces(self.tokenizer, wanted.stop)
        tokens = self.streams.generate(
            wanted.prompt, wanted.sampling, wanted.max_new_tokens, top_logprobs=wanted.top_logprobs
        )
        left = wanted.max_new_tokens
        async with aclosing(tokens):
            async for token in tokens:
                left -= 1
                piece = pieces.add(token.choice.token)
                if piece.stopped:
                    yield Part(piece.text, token, Finish("stop", pieces.stopped_by))
                    return
                ended = token.choice.token in self.streams.stop_tokens
                if ended or left == 0:
                    rest = pieces.finish()
                    reason = "stop" if pieces.stopped_by else "end" if ended else "length"
                    yield Part(piece.text + rest, token, Finish(reason, pieces.stopped_by))
                    return
                yield Part(piece.text, token, None)
