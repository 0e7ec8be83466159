"""Ollama's API (https://github.com/ollama/ollama/blob/main/docs/api.md), as far as asking goes.

Nothing is pulled, pushed or made here.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Iterator
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from swarm import __version__
from swarm.api.failures import RequestFailed, bad_request
from swarm.api.gateway import Gateway, joined
from swarm.api.openai_requests import MAX_MESSAGES, MAX_STOPS, Stop, Text, stops_of
from swarm.api.served_model import Finish, Part, ServedModel, Wanted
from swarm.api.streaming import Arriving, StreamedAnswer, unless_gone
from swarm.client import Sampling

Name = Annotated[str, Field(max_length=512)]


def ollama_failure(failure: RequestFailed) -> dict[str, Any]:
    """An error in Ollama's shape."""
    return {"error": failure.message}


class OllamaOptions(BaseModel):
    """How to sample; Ollama's defaults."""

    temperature: float = Field(default=0.8, ge=0, le=100)
    top_p: float = Field(default=0.9, gt=0, le=1)
    top_k: int = Field(default=40, ge=0, le=1_000_000)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repeat_penalty: float = Field(default=1.0, gt=0, le=10)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    num_predict: int | None = Field(default=None, ge=-2, le=10_000_000)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None

    def sampling(self) -> Sampling:
        """In our words."""
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repeat_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
        )

    def wanted(self, model: ServedModel, prompt: list[int]) -> Wanted:
        """The request. Raises RequestFailed."""
        most = self.num_predict if self.num_predict is not None and self.num_predict > 0 else None
        return model.wanted(prompt, most, sampling=self.sampling(), stop=stops_of(self.stop))


class OllamaMessage(BaseModel):
    """One turn."""

    role: Literal["system", "user", "assistant", "tool"]
    content: Text = ""
    images: list[str] | None = Field(default=None, max_length=64)


class OllamaChat(BaseModel):
    """``POST /api/chat``."""

    model: Name
    messages: Annotated[list[OllamaMessage], Field(max_length=MAX_MESSAGES)] = []
    stream: bool = True
    options: OllamaOptions | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=128)] | None = None


class OllamaGenerate(BaseModel):
    """``POST /api/generate``."""

    model: Name
    prompt: Text = ""
    system: Text | None = None
    raw: bool = False
    stream: bool = True
    options: OllamaOptions | None = None


class OllamaShow(BaseModel):
    """``POST /api/show``."""

    model: Name


def ollama_router(gateway: Gateway) -> APIRouter:
    """The endpoints under ``/api``."""
    router = APIRouter(prefix="/api", tags=["Ollama"])

    @router.get("/version")
    async def version() -> JSONResponse:
        """Of the gateway."""
        return JSONResponse({"version": __version__})

    @router.get("/tags")
    async def tags(request: Request) -> JSONResponse:
        """The models that are served here."""
        gateway.check_key(request)
        return JSONResponse({"models": [_about(model) for model in gateway.models.values()]})

    @router.get("/ps")
    async def running(request: Request) -> JSONResponse:
        """The same: all of them are loaded, elsewhere."""
        gateway.check_key(request)
        return JSONResponse({"models": [_about(model) for model in gateway.models.values()]})

    @router.post("/show")
    async def show(body: OllamaShow, request: Request) -> JSONResponse:
        """One of them."""
        gateway.check_key(request)
        model = _model(gateway, body.model)
        about: dict[str, Any] = {"details": _about(model)["details"], "capabilities": ["completion"]}
        about["template"] = str(model.tokenizer.chat_template or "")
        about["model_info"] = {"context_length": model.streams.context}
        return JSONResponse(about)

    @router.post("/chat")
    async def chat(body: OllamaChat, request: Request) -> Response:
        """Continue a conversation."""
        caller = gateway.caller(request)
        model = _model(gateway, body.model)
        if any(message.images for message in body.messages):
            raise bad_request("images cannot be read: this model reads text only")
        if not body.messages:
            return JSONResponse({**_line(model.name), "message": _message(""), "done": True, "done_reason": "load"})
        prompt = model.chat_prompt([turn.model_dump(include={"role", "content"}) for turn in body.messages], body.tools)
        wanted = (body.options or OllamaOptions()).wanted(model, prompt)
        answers = gateway.answers(model, [wanted], caller)
        return await _respond(model, wanted, answers, body.stream, "message", request, gateway)

    @router.post("/generate")
    async def generate(body: OllamaGenerate, request: Request) -> Response:
        """Answer a prompt, or with ``raw`` continue it."""
        caller = gateway.caller(request)
        model = _model(gateway, body.model)
        if not body.prompt:
            return JSONResponse({**_line(model.name), "response": "", "done": True, "done_reason": "load"})
        if body.raw or model.tokenizer.chat_template is None:
            prompt = model.text_prompt(body.prompt)
        else:
            system = [{"role": "system", "content": body.system}] if body.system else []
            prompt = model.chat_prompt([*system, {"role": "user", "content": body.prompt}], None)
        wanted = (body.options or OllamaOptions()).wanted(model, prompt)
        answers = gateway.answers(model, [wanted], caller)
        return await _respond(model, wanted, answers, body.stream, "response", request, gateway)

    return router


def _model(gateway: Gateway, name: str) -> ServedModel:
    return gateway.model(name.removesuffix(":latest"))


def _about(model: ServedModel) -> dict[str, Any]:
    config = model.streams.checkpoint.config
    return {
        "name": model.name,
        "model": model.name,
        "modified_at": datetime.fromtimestamp(model.since, UTC).isoformat(),
        "size": 0,
        "digest": model.streams.checkpoint.model_digest,
        "details": {"format": "swarm", "family": config.model_type, "families": [config.model_type]},
    }


def _line(name: str) -> dict[str, Any]:
    return {"model": name, "created_at": datetime.now(UTC).isoformat()}


def _message(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


async def _respond(
    model: ServedModel,
    wanted: Wanted,
    answers: AsyncGenerator[tuple[int, Part], None],
    stream: bool,
    field: Literal["message", "response"],
    request: Request,
    gateway: Gateway,
) -> Response:
    begun_ns, count, finish = time.monotonic_ns(), 0, None

    def said(text: str) -> dict[str, Any]:
        return {field: _message(text) if field == "message" else text}

    def last(finish: Finish | None, count: int) -> dict[str, Any]:
        return {
            "done": True,
            "done_reason": "length" if finish is not None and finish.reason == "length" else "stop",
            "total_duration": time.monotonic_ns() - begun_ns,
            "prompt_eval_count": len(wanted.prompt),
            "eval_count": count,
        }

    async def whole() -> JSONResponse:
        text, count, finish = await joined(answers)
        return JSONResponse({**_line(model.name), **said(text), **last(finish, count)})

    if not stream:
        return await unless_gone(request, whole(), gateway.metrics.lose_client)

    def render(numbered: tuple[int, Part]) -> Iterator[str]:
        nonlocal count, finish
        part = numbered[1]
        count, finish = count + 1, part.finish
        if part.text:
            yield json.dumps({**_line(model.name), **said(part.text), "done": False}, ensure_ascii=False) + "\n"

    def closing() -> Iterator[str]:
        yield json.dumps({**_line(model.name), **said(""), **last(finish, count)}) + "\n"

    def failed(failure: RequestFailed) -> Iterator[str]:
        yield json.dumps(ollama_failure(failure)) + "\n"

    arriving = Arriving(answers)
    await arriving.failed_at_once()
    return StreamedAnswer(
        arriving, render, closing=closing, failed=failed, keep_alive="",
        lost=gateway.metrics.lose_client, media_type="application/x-ndjson",
    )  # fmt: skip
