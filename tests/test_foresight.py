"""Servers begin with the likeliest next token before it has been chosen; what is generated stays the local model's."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUESTION, SmolLM2
from live_swarm import until
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList

from swarm.client import ClientSettings, Network, Sampling, TokenStreams
from swarm.client.foresight import Foresight
from swarm.client.session import Session
from swarm.commands.local_swarm import LocalSwarm
from swarm.errors import NoRoute
from swarm.models.draft_head import DraftHead, draft_of

SPANS = ["0:15", "15:30"]
TOKENS = 40


@pytest.fixture(scope="module")
def model(swarm: LocalSwarm, connect: Callable[..., Any]) -> Any:
    swarm.start_servers("smollm2", SPANS, "--threads", "1")
    return with_draft(connect("smollm2"))


def with_draft(model: Any, *, draft: bool = True) -> Any:
    """With or without one, whether or not it is worth while on this machine."""
    head = model.get_output_embeddings()
    head._draft = (head._draft or DraftHead(head)) if draft else None
    return model


class Otherwise(LogitsProcessor):  # type: ignore[misc]
    """Takes the second best token at every so many."""

    def __init__(self, every: int) -> None:
        self._every = every

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] % self._every == 0:
            scores = scores.scatter(1, scores.argmax(dim=1, keepdim=True), float("-inf"))
        return scores


def options(tokens: int = TOKENS) -> dict[str, Any]:
    return {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens}


def test_a_guess_is_acted_upon_after_two_that_were_right_and_later_after_one_that_was_wrong() -> None:
    foresight = Foresight()
    acted = []
    for expected, chosen in [(1, 1), (2, 2), (3, 3), (4, 5), (6, 6), (7, 7), (8, 8), (9, 9), (1, 1)]:
        acted.append(foresight.expect(expected))
        foresight.chosen(chosen)
    assert acted == [False, False, True, True, False, False, False, False, True]


@pytest.mark.parametrize("share_right", [0.0, 0.5, 0.9])
def test_of_tokens_that_cannot_be_foreseen_few_are_begun_in_vain(share_right: float) -> None:
    chance, foresight, in_vain = random.Random(3), Foresight(), 0
    for _ in range(10_000):
        is_right = chance.random() < share_right
        in_vain += foresight.expect(0) and not is_right
        foresight.chosen(0 if is_right else 1)
    assert in_vain <= 10  # of 10,000


def test_what_was_not_expected_is_no_mistake() -> None:
    foresight = Foresight()
    for token in range(5):
        foresight.expect(token)
        foresight.chosen(token)
        foresight.chosen(99)  # nothing was said about that one
    assert foresight.is_trusted


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_draft_names_what_the_head_puts_first(bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    head = nn.Linear(64, 1000, bias=bias).to(dtype)
    draft, rows = DraftHead(head), torch.randn(200, 64).to(dtype)
    with torch.no_grad():
        expected = head(rows.float().to(dtype)).float()
        named = [draft.likeliest(row) for row in rows.split(1)]
    right = sum(float(expected[index, name]) >= float(expected[index].max()) for index, name in enumerate(named))
    assert right >= 0.95 * len(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_whether_a_draft_is_worth_while_is_measured_once(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWARM_HOME", str(tmp_path))
    head = nn.Linear(96, 4000, bias=False).to(dtype)
    begun = time.monotonic()
    draft_of(head, head)
    assert time.monotonic() - begun < 45  # kernels are chosen meanwhile; nobody waits for a lock of one's own
    begun = time.monotonic()
    draft_of(head, head)
    assert time.monotonic() - begun < 1
    assert len(list((tmp_path / "choices").glob(f"draft-{str(dtype).removeprefix('torch.')}-*"))) == 1


@pytest.mark.parametrize("draft", [False, True], ids=["head itself", "draft"])
def test_nearly_all_greedy_tokens_are_begun_ahead_and_equal_local(model: Any, smollm2: SmolLM2, draft: bool) -> None:
    multiplications = list[int]()
    (multiplied,) = with_draft(model, draft=draft).get_output_embeddings()._made_from
    hook = multiplied.register_forward_hook(lambda *_: multiplications.append(1))
    with model.inference_session(max_length=256) as session:
        ids = model.generate(**smollm2.chat(QUESTION), session=session, **options())
        taken, in_vain = session.taken_ahead, session.ahead_in_vain
    hook.remove()
    with_draft(model)
    assert ids.tolist() == smollm2.greedy(QUESTION, TOKENS).tolist()
    assert taken >= 0.8 * TOKENS and in_vain <= 2
    assert len(multiplications) == TOKENS  # none twice


def test_wrong_guesses_are_rolled_back(model: Any, smollm2: SmolLM2) -> None:
    how = {**options(), "logits_processor": LogitsProcessorList([Otherwise(every=11)])}
    expected = smollm2.whole.generate(**smollm2.chat(QUESTION), **how)
    with model.inference_session(max_length=256) as session:
        ids = model.generate(**smollm2.chat(QUESTION), session=session, **how)
        assert session.ahead_in_vain >= 2 and session.taken_ahead > 0
    assert ids.tolist() == expected.tolist()


def test_a_session_goes_on_after_a_token_that_nobody_asked_for(model: Any, smollm2: SmolLM2) -> None:
    with model.inference_session(max_length=256) as session:
        for _ in range(3):  # each time one more was begun than was generated
            first = () if session.output_ids is not None else (smollm2.chat(QUESTION)["input_ids"],)
            model.generate(*first, session=session, **options(10))
        more = torch.tensor([[5, 17, 23]])
        model.generate(more, session=session, **options(10))
        ids = session.output_ids
    expected = torch.cat([smollm2.greedy(QUESTION, 30), more], dim=1)
    assert ids.tolist() == smollm2.whole.generate(expected, **options(10)).tolist()


def test_a_step_ahead_takes_no_room_that_was_not_asked_for(model: Any, smollm2: SmolLM2) -> None:
    inputs = smollm2.chat(QUESTION)
    length = inputs["input_ids"].shape[1]
    with model.inference_session(max_length=length + 9) as session:
        model.generate(**inputs, session=session, **options(10))
        assert session.taken_ahead > 0 and session.ahead_in_vain == 0
        assert session.position == length + 9


def test_threads_side_by_side_do_not_guess(model: Any, smollm2: SmolLM2) -> None:
    head = model.get_output_embeddings()
    assert head.looks_ahead
    head.expect(1)  # another thread
    assert not head.looks_ahead
    head.do_not_expect(1)


def test_who_does_not_want_it_does_without(model: Any, connect: Callable[..., Any], smollm2: SmolLM2) -> None:
    plain = connect("smollm2", look_ahead=False)
    assert not plain.get_output_embeddings().looks_ahead
    with plain.inference_session(max_length=256) as session:
        ids = plain.generate(**smollm2.chat(QUESTION), session=session, **options(8))
        assert session.taken_ahead == 0
    assert ids.tolist() == smollm2.greedy(QUESTION, 8).tolist()


async def test_a_gateways_only_stream_looks_ahead_and_several_do_not(
    swarm: LocalSwarm, model: Any, smollm2: SmolLM2
) -> None:
    network = await Network.join(ClientSettings(initial_peers=tuple(swarm.initial_peers)))
    sessions, new_session = list[Session](), network.session

    def remembered(*args: Any) -> Session:
        sessions.append(new_session(*args))
        return sessions[-1]

    network.session = remembered  # type: ignore[method-assign]
    streams = TokenStreams(network, smollm2.checkpoint)
    prompt = smollm2.chat(QUESTION)["input_ids"]

    async def tokens() -> list[int]:
        return [one.choice.token async for one in streams.generate(prompt[0].tolist(), Sampling(), TOKENS)]

    try:
        alone, *together = [await tokens(), *await asyncio.gather(tokens(), tokens())]
    finally:
        await streams.close()
        await network.leave()
    expected = smollm2.whole.generate(prompt, do_sample=False, max_new_tokens=TOKENS)[0, prompt.shape[1] :].tolist()
    assert alone == expected and together == [expected, expected]
    assert sessions[0].taken_ahead >= 0.8 * TOKENS and sessions[0].ahead_in_vain == 0
    assert [session.taken_ahead for session in sessions[1:]] == [0, 0]


@pytest.mark.parametrize("right", [True, False], ids=["right", "wrong"])
def test_a_step_ahead_fails_alone_and_the_next_is_tried_anew(
    swarm: LocalSwarm, connect: Callable[..., Any], smollm2: SmolLM2, right: bool
) -> None:
    """All servers of a span die while only a step that nobody has asked for is under way."""
    model = with_draft(connect("smollm2", deadline_s=1.0, peer_timeout_s=1.0))
    embed, ids = model.get_input_embeddings(), smollm2.chat(QUESTION)["input_ids"]
    with torch.no_grad(), model.inference_session(max_length=256) as session:
        session.step(embed(ids))
        victims = [server for server in swarm.servers if server.ready and server.ready["start"] == 15]
        for victim in victims:
            victim.process.send_signal(signal.SIGKILL)
            victim.process.wait()
        loop, machine = session._loop, session._session
        loop.loop.call_soon_threadsafe(session.step_ahead, embed(torch.tensor([[7]])))
        until(lambda: machine._ahead is None and not machine._awaited, 20)  # it was given up
        with pytest.raises(NoRoute):
            session.step(embed(torch.tensor([[7 if right else 9]])))
        swarm.start_servers("smollm2", ["15:30"], "--threads", "1")
        found = session.step(embed(torch.tensor([[7 if right else 9]])))
    whole = smollm2.whole(torch.cat([ids, torch.tensor([[7 if right else 9]])], dim=1), output_hidden_states=True)
    normed = model.base_model.norm(found)
    torch.testing.assert_close(normed[0, -1], whole.hidden_states[-1][0, -1], rtol=1e-3, atol=1e-3)
