"""The gateway: the clients that people have, over a real swarm, through deaths, hang-ups and nonsense."""

from __future__ import annotations

import base64
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anthropic
import httpx
import numpy
import ollama
import openai
import pytest
import schemathesis
import torch
from conftest import QUESTION, SmolLM2
from hypothesis import HealthCheck, given, settings
from live_gateway import LiveGateway, start_gateway
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance
from warm_start import WarmLoopback

from swarm.commands.local_swarm import LocalSwarm

_ALICE, _BOB = "sk-alice-123", "sk-bob-4567"
_KEYS = f'[alice]\nkey = "{_ALICE}"\n[bob]\nkey = "{_BOB}"\nrequests_per_minute = 2\n'
_ASK: Any = {"model": "smollm2", "messages": [{"role": "user", "content": QUESTION}]}


@pytest.fixture(scope="module")
def gateway(swarm: LocalSwarm, warm: WarmLoopback, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    keys = tmp_path_factory.mktemp("keys") / "keys.toml"
    keys.write_text(_KEYS)
    swarm.start_servers("smollm2", ["0:10", "10:20", "20:30"], "--threads", "1")
    with start_gateway(swarm, warm, "smollm2", "--api-keys", str(keys), "--max-requests", "8") as gateway:
        yield gateway


@pytest.fixture(scope="module")
def client(gateway: LiveGateway) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=_ALICE, max_retries=0)


def _greedy(smollm2: SmolLM2, count: int, question: str = QUESTION) -> str:
    inputs = smollm2.chat(question)
    ids = smollm2.whole.generate(**inputs, do_sample=False, max_new_tokens=count)
    return smollm2.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_openai_chat(client: openai.OpenAI, smollm2: SmolLM2) -> None:
    assert [model.id for model in client.models.list()] == ["smollm2"]
    assert client.models.retrieve("smollm2").id == "smollm2"
    expected = _greedy(smollm2, 24)
    answer = client.chat.completions.create(**_ASK, temperature=0, max_tokens=24, logprobs=True, top_logprobs=2)
    (choice,) = answer.choices
    assert choice.message.content == expected
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 24
    assert answer.usage.prompt_tokens == smollm2.chat(QUESTION)["input_ids"].shape[1]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert len(choice.logprobs.content) == 24
    for token in choice.logprobs.content:  # greedy: the likeliest
        assert token.logprob == token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob

    stream = client.chat.completions.create(
        **_ASK, temperature=0, max_tokens=24, stream=True, stream_options={"include_usage": True},
        extra_body={"swarm": {"route": True}},
    )  # fmt: skip
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
    assert chunks[-1].usage == answer.usage
    route = next(chunk.model_extra["swarm"] for chunk in chunks if chunk.model_extra and "swarm" in chunk.model_extra)
    assert [(hop["start"], hop["end"]) for hop in route["hops"]] == [(0, 10), (10, 20), (20, 30)]
    assert all(hop["total_ms"] > 0 for hop in route["hops"])


def test_openai_sampling(client: openai.OpenAI, smollm2: SmolLM2) -> None:
    inputs = smollm2.chat(QUESTION)

    def local(seed: int) -> str:
        torch.manual_seed(seed)
        ids = smollm2.whole.generate(**inputs, do_sample=True, temperature=0.8, top_p=0.9, top_k=0, max_new_tokens=12)
        return smollm2.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    answer = client.chat.completions.create(**_ASK, temperature=0.8, top_p=0.9, seed=5, n=2, max_tokens=12)
    assert [choice.message.content for choice in answer.choices] == [local(5), local(6)]
    whole = _greedy(smollm2, 24)
    stop = whole[20:23]
    answer = client.chat.completions.create(**_ASK, temperature=0, max_tokens=24, stop=[stop, "never said"])
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_openai_completions_and_embeddings(client: openai.OpenAI, smollm2: SmolLM2) -> None:
    texts = ["The sea is", "Once upon a time"]

    def local(text: str) -> str:
        ids = smollm2.whole.generate(
            **smollm2.tokenizer(text, return_tensors="pt"), do_sample=False, max_new_tokens=8
        )  # fmt: skip
        return smollm2.tokenizer.decode(ids[0], skip_special_tokens=True)

    answer = client.completions.create(model="smollm2", prompt=texts, temperature=0, max_tokens=8, echo=True)
    assert [choice.text for choice in answer.choices] == [local(text) for text in texts]
    tokens = smollm2.tokenizer(texts[0])["input_ids"]
    streamed = client.completions.create(
        model="smollm2", prompt=tokens, temperature=0, max_tokens=8, logprobs=1, stream=True
    )
    chunks = [chunk.choices[0] for chunk in streamed]
    assert texts[0] + "".join(chunk.text for chunk in chunks) == local(texts[0])
    assert all(chunk.logprobs is not None for chunk in chunks)

    given = client.embeddings.create(model="smollm2", input=texts)
    for text, one in zip(texts, given.data, strict=True):
        with torch.no_grad():
            states = smollm2.whole.model(**smollm2.tokenizer(text, return_tensors="pt")).last_hidden_state
        torch.testing.assert_close(torch.tensor(one.embedding), states[0].mean(dim=0), atol=1e-4, rtol=1e-4)
    raw = client.embeddings.with_raw_response.create(model="smollm2", input=texts, encoding_format="base64").parse()
    packed: Any = raw.data[0].embedding
    unpacked = numpy.frombuffer(base64.b64decode(packed), "<f4") if isinstance(packed, str) else packed
    assert list(unpacked) == pytest.approx(given.data[0].embedding)


def test_anthropic(gateway: LiveGateway, smollm2: SmolLM2) -> None:
    client = anthropic.Anthropic(base_url=gateway.url, api_key=_ALICE, max_retries=0)
    expected = _greedy(smollm2, 16)
    message = client.messages.create(**_ASK, max_tokens=16, extra_body={"temperature": 0})
    (block,) = message.content
    assert block.type == "text"
    assert block.text == expected
    assert message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 16
    with client.messages.stream(**_ASK, max_tokens=16, extra_body={"temperature": 0}) as stream:
        assert "".join(stream.text_stream) == expected
    assert client.messages.count_tokens(**_ASK).input_tokens == message.usage.input_tokens
    with pytest.raises(anthropic.NotFoundError, match="not served here"):
        client.messages.create(**{**_ASK, "model": "claude"}, max_tokens=1)


def test_ollama(gateway: LiveGateway, smollm2: SmolLM2) -> None:
    client = ollama.Client(host=gateway.url, headers={"Authorization": f"Bearer {_ALICE}"})
    assert [model.model for model in client.list().models] == ["smollm2"]
    expected = _greedy(smollm2, 16)
    greedy: Any = {"temperature": 0, "num_predict": 16}
    assert client.chat(**_ASK, options=greedy).message.content == expected
    parts = list(client.chat(**_ASK, options=greedy, stream=True))
    assert "".join(part.message.content or "" for part in parts) == expected
    assert parts[-1].done
    assert parts[-1].eval_count == 16
    assert client.generate("smollm2", QUESTION, options=greedy).response == expected
    with pytest.raises(ollama.ResponseError, match="not served here"):
        client.generate("llama", QUESTION)


def test_keys_and_limits(gateway: LiveGateway) -> None:
    stranger = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="sk-wrong-000", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
        stranger.models.list()
    with pytest.raises(openai.AuthenticationError):
        stranger.chat.completions.create(**_ASK)
    bob = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=_BOB, max_retries=0)
    for _ in range(2):
        bob.chat.completions.create(**_ASK, max_tokens=1)
    with pytest.raises(openai.RateLimitError) as limited:
        bob.chat.completions.create(**_ASK, max_tokens=1)
    assert 1 <= int(limited.value.response.headers["Retry-After"]) <= 30


def test_who_hangs_up_frees_everything(gateway: LiveGateway, client: openai.OpenAI) -> None:
    lost = gateway.metric("lost_clients_total")
    stream = client.chat.completions.create(**_ASK, max_tokens=2000, stream=True)
    next(iter(stream))
    assert gateway.health()["running"] == 1
    stream.close()
    assert gateway.idle_within_s(2)
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).chat.completions.create(**_ASK, max_tokens=2000)
    assert gateway.idle_within_s(2)
    assert gateway.metric("lost_clients_total") == lost + 2


def _chat_body(**changes: Any) -> bytes:
    return json.dumps({**_ASK, **changes}).encode()


@pytest.mark.parametrize(
    ("body", "status", "complaint"),
    [
        (b"{", 400, "JSON"),
        (b"[]", 400, "valid dictionary"),
        (b'{"model": "smollm2"}', 400, "messages"),
        (_chat_body(model="gpt-9"), 404, "not served here"),
        (_chat_body(temperature="hot"), 400, "temperature"),
        (_chat_body(logit_bias={"99999999": 1}), 400, "vocabulary"),
        (_chat_body(response_format={"type": "json_object"}), 400, "response_format"),
        (_chat_body(messages=[{"role": "user", "content": "sea " * 9000}]), 400, "context"),
        (_chat_body(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), 400, "text only"),
        (b"x" * 10_000_000, 413, "larger than 4 MiB"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_nonsense_gets_the_right_status(gateway: LiveGateway, body: bytes, status: int, complaint: str) -> None:
    headers = {"Authorization": f"Bearer {_ALICE}", "Content-Type": "application/json"}
    response = httpx.post(f"{gateway.url}/v1/chat/completions", content=body, headers=headers)
    assert response.status_code == status
    assert complaint in response.json()["error"]["message"]


def test_a_body_of_unknown_length_is_cut_off(gateway: LiveGateway) -> None:
    headers = {"Authorization": f"Bearer {_ALICE}"}
    endless = (b"x" * 100_000 for _ in range(100))
    response = httpx.post(f"{gateway.url}/v1/chat/completions", content=endless, headers=headers)
    assert response.status_code == 413


def test_a_request_that_never_ends_is_ended(gateway: LiveGateway, client: openai.OpenAI) -> None:
    """A slow-loris, and beside it somebody who notices nothing."""
    address = urlsplit(gateway.url)
    slow = [socket.create_connection((address.hostname, address.port)) for _ in range(20)]
    begun = time.monotonic()
    for connection in slow:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n")
    client.chat.completions.create(**_ASK, max_tokens=4)
    for connection in slow:
        connection.settimeout(15)
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")
        connection.close()
    assert time.monotonic() - begun < 14


def test_no_request_fails_when_a_server_dies(
    swarm: LocalSwarm, gateway: LiveGateway, client: openai.OpenAI, smollm2: SmolLM2
) -> None:
    swarm.start_server("smollm2", "--blocks", "10:20", "--threads", "1")
    expected = _greedy(smollm2, 32)
    middle: list[str] = []  # of the routes, as answers tell them

    def chat(number: int) -> tuple[str, int]:
        text, recoveries = "", 0
        for chunk in client.chat.completions.create(
            **_ASK, temperature=0, max_tokens=32, stream=True, extra_body={"swarm": {"route": True}}
        ):
            text += chunk.choices[0].delta.content or ""
            about = (chunk.model_extra or {}).get("swarm")
            if about is not None:
                middle.extend(hop["peer_id"] for hop in about["hops"] if hop["start"] == 10)
                recoveries = max(recoveries, about["recoveries"])
        return text, recoveries

    with ThreadPoolExecutor(6) as threads:
        answers = [threads.submit(chat, number) for number in range(6)]
        while len(middle) < 6:
            time.sleep(0.02)
        swarm.server(middle[0]).kill()
        texts = [answer.result() for answer in answers]
    assert [text for text, _ in texts] == [expected] * 6
    assert max(recoveries for _, recoveries in texts) == 1
    assert gateway.idle_within_s(2)


def test_no_request_makes_it_fail(gateway: LiveGateway) -> None:
    described = schemathesis.openapi.from_url(f"{gateway.url}/openapi.json")
    operations = [result.ok() for result in described.get_all_operations()]
    assert len(operations) >= 12, "no endpoint is left out"
    for operation in operations:

        @settings(max_examples=8, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def ask(case: Any) -> None:
            response = case.call(headers={"Authorization": f"Bearer {_ALICE}"})
            case.validate_response(response, checks=(not_a_server_error, response_schema_conformance))

        ask()


def test_port_taken(gateway: LiveGateway, swarm: LocalSwarm, tmp_path: Path) -> None:
    port = str(urlsplit(gateway.url).port)
    code, log = gateway.run_another(swarm, "smollm2", "--port", port)
    assert code == 1
    assert f"Cannot listen on 127.0.0.1 port {port}" in log
    assert "--port" in log
