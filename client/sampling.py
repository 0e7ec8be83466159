"""How the next token is chosen from logits: as transformers' ``generate()`` does, for one sequence at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from transformers import LogitsProcessorList
from transformers.generation import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from swarm.errors import ServerFault


@dataclass(frozen=True)
class Sampling:
    """What a user can ask for. The defaults are greedy."""

    temperature: float = 0.0
    """0: the likeliest token."""
    top_p: float = 1.0
    top_k: int = 0
    """0: all."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Of tokens that occurred, prompt included (Keskar et al. 2019)."""
    presence_penalty: float = 0.0
    """Taken from the logit of every token that was generated already."""
    frequency_penalty: float = 0.0
    """The same, as often as it was."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to these tokens' logits."""
    seed: int | None = None
    """The same seed gives the same tokens, also those that ``generate()`` gives after ``torch.manual_seed(seed)``."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise ValueError(f"temperature={self.temperature:g} is not between 0 and 100")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p:g} is not above 0, or above 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p:g} is not between 0 and 1")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} is below 0")
        if not 0 < self.repetition_penalty <= 100:
            raise ValueError(f"repetition_penalty={self.repetition_penalty:g} is not above 0, or above 100")


@dataclass(frozen=True)
class Choice:
    """A chosen token, with natural logarithms of probabilities as the model gave them, before any sampling."""

    token: int
    logprob: float | None
    """None unless asked for."""
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens, as many as asked for."""


class Sampler:
    """Chooses one sequence's tokens, one after the other.

    Args:
        prompt: the tokens before the first one to choose.
        top_logprobs: how many of the likeliest tokens to report; None: report no probabilities at all.
    """

    def __init__(self, sampling: Sampling, prompt: torch.Tensor, top_logprobs: int | None = None) -> None:
        self._sampling, self._top_logprobs = sampling, top_logprobs
        self._ids = prompt.reshape(1, -1)
        self._counts: dict[int, int] = {}  # of generated tokens
        self._generator: torch.Generator | None = None
        if sampling.temperature > 0:
            self._generator = torch.Generator()
            if sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(sampling.seed)
        self._processors = _processors(sampling)

    def choose(self, logits: torch.Tensor) -> Choice:
        """The next token, for the ``[vocabulary]`` logits of the position before it.

        Raises:
            ServerFault: they are no numbers, so neither is what the servers computed.
        """
        logits = logits.to("cpu", torch.float32)
        if not bool(logits.max().isfinite()):  # NaN is the greatest of all
            raise ServerFault("the servers' results are no numbers (NaN or infinite)")
        scores = self._adjusted(logits).unsqueeze(0)
        if self._processors:
            scores = self._processors(self._ids, scores)
        if self._generator is None:
            token = int(scores.argmax())
        else:
            token = int(torch.multinomial(scores.softmax(dim=-1), 1, generator=self._generator))
        self._counts[token] = self._counts.get(token, 0) + 1
        if self._sampling.repetition_penalty != 1:
            self._ids = torch.cat([self._ids, self._ids.new_tensor([[token]])], dim=1)
        if self._top_logprobs is None:
            return Choice(token, None, ())
        logprobs = logits.log_softmax(dim=-1)
        values, tokens = logprobs.topk(min(self._top_logprobs, len(logprobs)))
        return Choice(token, float(logprobs[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))

    def _adjusted(self, logits: torch.Tensor) -> torch.Tensor:
        sampling = self._sampling
        changes = dict(sampling.logit_bias)
        if sampling.presence_penalty or sampling.frequency_penalty:
            for token, count in self._counts.items():
                penalty = sampling.presence_penalty + sampling.frequency_penalty * count
                changes[token] = changes.get(token, 0.0) - penalty
        if not changes:
            return logits
        logits = logits.clone()
        logits[list(changes)] += torch.tensor(list(changes.values()))
        return logits


def _processors(sampling: Sampling) -> LogitsProcessorList:
    """In the order in which ``generate()`` applies them."""
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature == 0:
        return processors
    if sampling.temperature != 1:
        processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        processors.append(MinPLogitsWarper(sampling.min_p))
    return processors
