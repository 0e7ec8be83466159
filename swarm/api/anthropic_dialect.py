"""Anthropic's Messages API (https://docs.anthropic.com/en/api/messages), as far as text goes."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncGenerator, Iterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from swarm.api.failures import RequestFailed
from swarm.api.gateway import Gateway, joined
from swarm.api.openai_requests import MAX_MESSAGES, MAX_STOPS, Content, Stop, text_of
from swarm.api.served_model import Finish, Part, ServedModel, Wanted
from swarm.api.streaming import Arriving, StreamedAnswer, unless_gone
from swarm.client import Sampling

_REASONS = {"end": "end_turn", "stop": "stop_sequence", "length": "max_tokens"}
_KINDS_OF_TEXT = ("text",)
_KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 503: "overloaded_error",
}  # fmt: skip


def anthropic_failure(failure: RequestFailed) -> dict[str, Any]:
    """An error in Anthropic's shape."""
    kind = _KINDS.get(failure.status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": failure.message}}


class AnthropicMessage(BaseModel):
    """One turn."""

    role: Literal["user", "assistant", "system"]
    content: Content


class Counting(BaseModel):
    """``POST /v1/messages/count_tokens``."""

    model: Annotated[str, Field(max_length=512)]
    messages: Annotated[list[AnthropicMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: Content | None = None


class MessagesRequest(Counting):
    """``POST /v1/messages``."""

    max_tokens: int = Field(ge=1, le=10_000_000)
    stop_sequences: Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool = False
    temperature: float | None = Field(default=None, ge=0, le=1, description="Default 1; 0 is greedy.")
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=1_000_000)


def anthropic_router(gateway: Gateway) -> APIRouter:
    """``/v1/messages``."""
    router = APIRouter(prefix="/v1/messages", tags=["Anthropic"])

    @router.post("")
    async def messages(body: MessagesRequest, request: Request) -> Response:
        """Continue a conversation."""
        caller = gateway.caller(request)
        model = gateway.model(body.model)
        sampling = Sampling(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=body.top_p or 1.0,
            top_k=body.top_k or 0,
        )
        wanted = model.wanted(
            _prompt(model, body), body.max_tokens, sampling=sampling, stop=tuple(body.stop_sequences or ())
        )
        answers = gateway.answers(model, [wanted], caller)
        about = {
            "id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant", "model": model.name,
        }  # fmt: skip
        if not body.stream:
            return await unless_gone(request, _whole(about, wanted, answers), gateway.metrics.lose_client)
        return await _streamed(about, wanted, answers, gateway)

    @router.post("/count_tokens")
    async def count_tokens(body: Counting, request: Request) -> JSONResponse:
        """How long the prompt is."""
        gateway.check_key(request)
        return JSONResponse({"input_tokens": len(_prompt(gateway.model(body.model), body))})

    return router


def _prompt(model: ServedModel, body: Counting) -> list[int]:
    system = [{"role": "system", "content": text_of(body.system, _KINDS_OF_TEXT)}] if body.system else []
    turns = [{"role": turn.role, "content": text_of(turn.content, _KINDS_OF_TEXT)} for turn in body.messages]
    return model.chat_prompt([*system, *turns], None)


def _ending(finish: Finish | None) -> dict[str, Any]:
    reason = _REASONS[finish.reason] if finish is not None else None
    return {"stop_reason": reason, "stop_sequence": finish.stop if finish is not None else None}


async def _whole(
    about: dict[str, Any], wanted: Wanted, answers: AsyncGenerator[tuple[int, Part], None]
) -> JSONResponse:
    text, count, finish = await joined(answers)
    usage = {"input_tokens": len(wanted.prompt), "output_tokens": count}
    return JSONResponse({**about, "content": [{"type": "text", "text": text}], **_ending(finish), "usage": usage})


async def _streamed(
    about: dict[str, Any], wanted: Wanted, answers: AsyncGenerator[tuple[int, Part], None], gateway: Gateway
) -> Response:
    count, finish = 0, None

    def event(kind: str, **fields: Any) -> str:
        return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields}, ensure_ascii=False)}\n\n"

    def opening() -> Iterator[str]:
        usage = {"input_tokens": len(wanted.prompt), "output_tokens": 0}
        yield event("message_start", message={**about, "content": [], **_ending(None), "usage": usage})
        yield event("content_block_start", index=0, content_block={"type": "text", "text": ""})

    def render(numbered: tuple[int, Part]) -> Iterator[str]:
        nonlocal count, finish
        part = numbered[1]
        count, finish = count + 1, part.finish
        if part.text:
            yield event("content_block_delta", index=0, delta={"type": "text_delta", "text": part.text})

    def closing() -> Iterator[str]:
        yield event("content_block_stop", index=0)
        yield event("message_delta", delta=_ending(finish), usage={"output_tokens": count})
        yield event("message_stop")

    def failed(failure: RequestFailed) -> Iterator[str]:
        yield f"event: error\ndata: {json.dumps(anthropic_failure(failure))}\n\n"

    arriving = Arriving(answers)
    await arriving.failed_at_once()
    return StreamedAnswer(
        arriving, render, opening=opening, closing=closing, failed=failed, keep_alive=event("ping"),
        lost=gateway.metrics.lose_client,
    )  # fmt: skip
