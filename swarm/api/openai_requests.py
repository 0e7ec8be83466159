"""Requests in OpenAI's words (https://platform.openai.com/docs/api-reference), as far as a swarm can serve them.

Fields that are not named here are ignored, as OpenAI's own clients send more with every version; those that would
change the answer if they were understood are named, and refused.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from swarm.api.failures import bad_request
from swarm.api.gateway import MOST_ANSWERS
from swarm.client import Sampling

MAX_STOPS, MAX_STOP_LENGTH = 16, 256
MAX_MESSAGES = 2048
MAX_PROMPTS = 64

Stop = Annotated[str, Field(max_length=MAX_STOP_LENGTH)]
Text = Annotated[str, Field(max_length=4_000_000)]
TokenIds = Annotated[list[int], Field(max_length=1_000_000)]


class StreamOptions(BaseModel):
    """What a stream carries besides the answer."""

    include_usage: bool = False


class SwarmOptions(BaseModel):
    """Ours: what only a swarm can tell."""

    route: bool = Field(default=False, description="Let chunks tell the route, and where the time of a token goes.")


class ResponseFormat(BaseModel):
    """Only text."""

    type: str = "text"


class Generating(BaseModel):
    """What chats and completions have in common."""

    model: Annotated[str, Field(max_length=512)]
    n: int = Field(default=1, ge=1, le=MOST_ANSWERS)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    temperature: float | None = Field(default=None, ge=0, le=2, description="Default 1; 0 is greedy.")
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=1_000_000)
    min_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = Field(default=None, max_length=1024)
    swarm: SwarmOptions = SwarmOptions()

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop sequences."""
        return stops_of(self.stop)

    def sampling(self, number: int) -> Sampling:
        """For answer `number`: each has a seed of its own."""
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=self.top_p or 1.0,
            top_k=self.top_k or 0,
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            logit_bias=self.logit_bias or {},
            seed=None if self.seed is None else (self.seed + number) % 2**63,
        )


class TextPart(BaseModel):
    """A part of a message; images and sounds are refused."""

    type: str
    text: Text | None = None


Content = Text | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES)]


class ChatMessage(BaseModel):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content | None = None
    name: Annotated[str, Field(max_length=256)] | None = None
    tool_calls: Annotated[list[dict[str, Any]], Field(max_length=128)] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it. Raises RequestFailed for what is no text."""
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": text_of(self.content or ""),
        }
        for field in ("name", "tool_calls", "tool_call_id"):
            if (value := getattr(self, field)) is not None:
                message[field] = value
        return message


class ChatRequest(Generating):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: int | None = Field(default=None, ge=1, le=10_000_000)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=10_000_000)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: Annotated[list[dict[str, Any]], Field(max_length=128)] | None = Field(
        default=None, description="Handed to the model's chat template; what it makes of them comes back as text."
    )
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _logprobs_go_together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.response_format is not None and self.response_format.type != "text":
            raise ValueError(f"response_format {self.response_format.type!r} is not supported: only text")
        return self


class CompletionRequest(Generating):
    """``POST /v1/completions``."""

    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(max_length=MAX_PROMPTS)]
        | Annotated[list[TokenIds], Field(max_length=MAX_PROMPTS)]
    )
    max_tokens: int | None = Field(default=16, ge=1, le=10_000_000)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool = False
    suffix: str | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _supported(self) -> CompletionRequest:
        if self.suffix:
            raise ValueError("suffix is not supported")
        if self.best_of is not None and self.best_of != self.n:
            raise ValueError("best_of is not supported")
        return self


class EmbeddingRequest(BaseModel):
    """``POST /v1/embeddings``: the mean of the last hidden states."""

    model: Annotated[str, Field(max_length=512)]
    input: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(max_length=MAX_PROMPTS)]
        | Annotated[list[TokenIds], Field(max_length=MAX_PROMPTS)]
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None

    @field_validator("dimensions")
    @classmethod
    def _all_dimensions(cls, dimensions: int | None) -> int | None:
        if dimensions is not None:
            raise ValueError("dimensions is not supported: an embedding has as many as the model's hidden states")
        return None


def stops_of(stop: str | list[str] | None) -> tuple[str, ...]:
    """The stop sequences, however many are given."""
    if stop is None:
        return ()
    return (stop,) if isinstance(stop, str) else tuple(stop)


def text_of(content: str | list[TextPart], kinds: Collection[str] = ("text", "input_text", "refusal")) -> str:
    """A message's text. Raises RequestFailed for parts of other `kinds`: they are no text."""
    if isinstance(content, str):
        return content
    for part in content:
        if part.type not in kinds or part.text is None:
            raise bad_request(f"message parts of type {part.type!r} cannot be read: this model reads text only")
    return "".join(part.text or "" for part in content)


def prompts_of(given: Any) -> list[str | list[int]]:
    """One or several prompts, each a text or token ids. Raises RequestFailed if there are none."""
    prompts = given if isinstance(given, list) and not all(isinstance(one, int) for one in given) else [given]
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise bad_request("the prompt is empty")
    return list(prompts)
