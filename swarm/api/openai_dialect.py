"""OpenAI's API: models, chat completions, completions, embeddings (https://platform.openai.com/docs/api-reference)."""

from __future__ import annotations

import base64
import itertools
import json
import secrets
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from swarm.api.failures import RequestFailed, bad_request
from swarm.api.gateway import MOST_ANSWERS, Gateway
from swarm.api.openai_requests import ChatRequest, CompletionRequest, EmbeddingRequest, Generating, prompts_of
from swarm.api.route_report import RouteReport
from swarm.api.served_model import Finish, Part, ServedModel, Wanted
from swarm.api.streaming import Arriving, StreamedAnswer, unless_gone
from swarm.client import Token

_FINISH = {"end": "stop", "stop": "stop", "length": "length"}
_KEEP_ALIVE = ": keep-alive\n\n"


def openai_failure(failure: RequestFailed) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    return {"error": {"message": failure.message, "type": failure.kind, "param": None, "code": failure.code}}


def openai_router(gateway: Gateway) -> APIRouter:
    """The endpoints under ``/v1``."""
    router = APIRouter(prefix="/v1", tags=["OpenAI"])

    @router.get("/models")
    async def models(request: Request) -> JSONResponse:
        """The models that are served here."""
        gateway.check_key(request)
        return JSONResponse({"object": "list", "data": [_model(model) for model in gateway.models.values()]})

    @router.get("/models/{name:path}")
    async def model(name: str, request: Request) -> JSONResponse:
        """One of them."""
        gateway.check_key(request)
        return JSONResponse(_model(gateway.model(name)))

    @router.post("/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Continue a conversation."""
        caller = gateway.caller(request)
        model = gateway.model(body.model)
        prompt = model.chat_prompt([message.for_template() for message in body.messages], body.tools)
        top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        wanted = [
            _wanted(model, body, prompt, number, body.max_completion_tokens or body.max_tokens, top_logprobs)
            for number in range(body.n)
        ]
        answers = gateway.answers(model, wanted, caller)
        return await _respond(_ChatShape(model), body, wanted, answers, request, gateway)

    @router.post("/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue a text."""
        caller = gateway.caller(request)
        model = gateway.model(body.model)
        prompts = prompts_of(body.prompt)
        if len(prompts) * body.n > MOST_ANSWERS:
            raise bad_request(f"{len(prompts)} prompts with n={body.n} are more than {MOST_ANSWERS} answers")
        wanted = [
            _wanted(model, body, _tokens(model, prompt), number, body.max_tokens, body.logprobs)
            for prompt in prompts
            for number in range(body.n)
        ]
        echoed = [_text(model, prompt) for prompt in prompts for _ in range(body.n)] if body.echo else None
        answers = gateway.answers(model, wanted, caller)
        return await _respond(_TextShape(model, echoed), body, wanted, answers, request, gateway)

    @router.post("/embeddings")
    async def embeddings(body: EmbeddingRequest, request: Request) -> JSONResponse:
        """One vector for each text: the mean of its last hidden states."""
        caller = gateway.caller(request)
        model = gateway.model(body.model)
        prompts = [_tokens(model, prompt) for prompt in prompts_of(body.input)]
        checked = [_wanted(model, None, prompt, 0, 1, None).prompt for prompt in prompts]

        async def embed() -> list[Any]:
            vectors = [(await model.streams.embed(prompt)).float().mean(dim=0) for prompt in checked]
            if body.encoding_format == "base64":
                return [base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode() for vector in vectors]
            return [vector.tolist() for vector in vectors]

        vectors = await unless_gone(request, gateway.alone(embed(), caller), gateway.metrics.lose_client)
        data = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)]
        count = sum(map(len, checked))
        usage = {"prompt_tokens": count, "total_tokens": count}
        return JSONResponse({"object": "list", "data": data, "model": model.name, "usage": usage})

    return router


def _model(model: ServedModel) -> dict[str, Any]:
    about = {"id": model.name, "object": "model", "created": model.since, "owned_by": "swarm"}
    return {**about, "context_length": model.streams.context}


def _wanted(
    model: ServedModel,
    body: Generating | None,
    prompt: Sequence[int],
    number: int,
    max_new_tokens: int | None,
    top_logprobs: int | None,
) -> Wanted:
    if body is None:
        return model.wanted(prompt, max_new_tokens)
    return model.wanted(
        prompt, max_new_tokens, sampling=body.sampling(number), stop=body.stops, top_logprobs=top_logprobs
    )


def _tokens(model: ServedModel, prompt: str | list[int]) -> list[int]:
    return model.text_prompt(prompt) if isinstance(prompt, str) else prompt


def _text(model: ServedModel, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else str(model.tokenizer.decode(prompt))


class _ChatShape:
    """How chats look."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: ServedModel) -> None:
        self._model = model

    def opening(self, number: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": number, "delta": delta, "logprobs": None, "finish_reason": None}

    def part(self, number: int, part: Part) -> dict[str, Any]:
        return {
            "index": number,
            "delta": {"content": part.text} if part.text or part.finish is None else {},
            "logprobs": self.logprobs([part.token]),
            "finish_reason": _finish(part.finish),
        }

    def choice(self, number: int, text: str, tokens: list[Token], finish: Finish | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        logprobs = self.logprobs(tokens)
        return {"index": number, "message": message, "logprobs": logprobs, "finish_reason": _finish(finish)}

    def logprobs(self, tokens: list[Token]) -> dict[str, Any] | None:
        if not tokens or tokens[0].choice.logprob is None:
            return None

        def shown(token: int, logprob: float | None) -> dict[str, Any]:
            text = str(self._model.tokenizer.decode([token]))
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        return {
            "content": [
                {
                    **shown(token.choice.token, token.choice.logprob),
                    "top_logprobs": [shown(one, logprob) for one, logprob in token.choice.top],
                }
                for token in tokens
            ],
            "refusal": None,
        }


class _TextShape:
    """How completions look."""

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: ServedModel, echoed: list[str] | None) -> None:
        self._model, self._echoed = model, echoed

    def opening(self, number: int) -> dict[str, Any] | None:
        if self._echoed is None:
            return None
        return {"index": number, "text": self._echoed[number], "logprobs": None, "finish_reason": None}

    def part(self, number: int, part: Part) -> dict[str, Any]:
        logprobs = self.logprobs([part.token])
        return {"index": number, "text": part.text, "logprobs": logprobs, "finish_reason": _finish(part.finish)}

    def choice(self, number: int, text: str, tokens: list[Token], finish: Finish | None) -> dict[str, Any]:
        whole = text if self._echoed is None else self._echoed[number] + text
        return {"index": number, "text": whole, "logprobs": self.logprobs(tokens), "finish_reason": _finish(finish)}

    def logprobs(self, tokens: list[Token]) -> dict[str, Any] | None:
        if not tokens or tokens[0].choice.logprob is None:
            return None
        texts = [str(self._model.tokenizer.decode([token.choice.token])) for token in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [token.choice.logprob for token in tokens],
            "top_logprobs": [
                {str(self._model.tokenizer.decode([one])): logprob for one, logprob in token.choice.top}
                for token in tokens
            ],
            "text_offset": list(itertools.accumulate(map(len, texts[:-1]), initial=0)),
        }


def _finish(finish: Finish | None) -> str | None:
    return _FINISH[finish.reason] if finish is not None else None


async def _respond(
    shape: _ChatShape | _TextShape,
    body: Generating,
    wanted: Sequence[Wanted],
    answers: AsyncGenerator[tuple[int, Part], None],
    request: Request,
    gateway: Gateway,
) -> Response:
    about = {"id": f"{shape.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": body.model}
    report = RouteReport() if body.swarm.route else None
    if not body.stream:
        return await unless_gone(request, _whole(shape, about, wanted, answers, report), gateway.metrics.lose_client)
    about["object"] = shape.chunk
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    count = 0

    def event(**fields: Any) -> str:
        return f"data: {json.dumps({**about, **fields}, ensure_ascii=False, separators=(',', ':'))}\n\n"

    def opening() -> Iterator[str]:
        for number in range(len(wanted)):
            if (choice := shape.opening(number)) is not None:
                yield event(choices=[choice])

    def render(numbered: tuple[int, Part]) -> Iterator[str]:
        nonlocal count
        count += 1
        number, part = numbered
        extra = report.extra(part.token) if report is not None else {}
        if part.text or part.finish or extra or part.token.choice.logprob is not None:
            yield event(choices=[shape.part(number, part)], **extra)

    def closing() -> Iterator[str]:
        if with_usage:
            yield event(choices=[], usage=_usage(wanted, count))
        yield "data: [DONE]\n\n"

    def failed(failure: RequestFailed) -> Iterator[str]:
        yield f"data: {json.dumps(openai_failure(failure))}\n\n"
        yield "data: [DONE]\n\n"

    arriving = Arriving(answers)
    await arriving.failed_at_once()
    return StreamedAnswer(
        arriving, render, opening=opening, closing=closing, failed=failed, keep_alive=_KEEP_ALIVE,
        lost=gateway.metrics.lose_client,
    )  # fmt: skip


async def _whole(
    shape: _ChatShape | _TextShape,
    about: dict[str, Any],
    wanted: Sequence[Wanted],
    answers: AsyncGenerator[tuple[int, Part], None],
    report: RouteReport | None,
) -> JSONResponse:
    texts = [""] * len(wanted)
    tokens: list[list[Token]] = [[] for _ in wanted]
    finishes: list[Finish | None] = [None] * len(wanted)
    extra: dict[str, Any] = {}
    async with aclosing(answers):
        async for number, part in answers:
            texts[number] += part.text
            tokens[number].append(part.token)
            finishes[number] = part.finish
            if report is not None:
                extra = report.extra(part.token) or extra
    choices = [
        shape.choice(number, *parts) for number, parts in enumerate(zip(texts, tokens, finishes, strict=True))
    ]  # fmt: skip
    usage = _usage(wanted, sum(map(len, tokens)))
    return JSONResponse({**about, "object": shape.whole, "choices": choices, "usage": usage, **extra})


def _usage(wanted: Sequence[Wanted], new_tokens: int) -> dict[str, int]:
    # Of several answers to one prompt, the prompt counts once.
    prompts = sum(len(prompt) for prompt in {one.prompt for one in wanted})
    return {"prompt_tokens": prompts, "completion_tokens": new_tokens, "total_tokens": prompts + new_tokens}
