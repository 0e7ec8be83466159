"""The gateway's decisions: text out of tokens, whose turn it is, who may ask, which token is next."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from swarm.api.keys import Allowance, Callers, Key, read_keys
from swarm.api.queue import Queue, QueueFull
from swarm.api.text_pieces import TextPieces
from swarm.client import Sampling
from swarm.client.sampling import Sampler
from swarm.errors import ServerFault
from swarm.models import open_checkpoint


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return open_checkpoint("smollm2").tokenizer()


def _shown(tokenizer: PreTrainedTokenizerBase, tokens: list[int], stop: tuple[str, ...] = ()) -> str:
    pieces = TextPieces(tokenizer, stop)
    text = ""
    for token in tokens:
        piece = pieces.add(token)
        text += piece.text
        if piece.stopped:
            return text
    return text + pieces.finish()


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40))
def test_pieces_add_up_to_the_text(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    tokens = tokenizer(text)["input_ids"]
    assert _shown(tokenizer, tokens) == tokenizer.decode(tokens, skip_special_tokens=True)


def test_no_piece_has_half_a_character(tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = tokenizer("naïve 👩‍🚀 日本語 done")["input_ids"]
    pieces = TextPieces(tokenizer)
    assert not any("\N{REPLACEMENT CHARACTER}" in pieces.add(token).text for token in tokens)


@settings(max_examples=60, deadline=None)
@given(text=st.text("abc \n", max_size=40), stops=st.lists(st.text("abc\n", min_size=1, max_size=3), max_size=3))
def test_text_ends_before_the_stop_sequence_that_is_complete_first(
    tokenizer: PreTrainedTokenizerBase, text: str, stops: list[str]
) -> None:
    tokens = tokenizer(text)["input_ids"]
    expected = ""
    for count in range(len(tokens) + 1):  # the text ends with the token that completes one of them
        expected = tokenizer.decode(tokens[:count], skip_special_tokens=True)
        if ends := [index for stop in stops if (index := expected.find(stop)) >= 0]:
            expected = expected[: min(ends)]
            break
    assert _shown(tokenizer, tokens, tuple(stops)) == expected


def test_sampling_is_what_generate_does(tiny: str) -> None:
    """The same seed, logits and settings choose what transformers' own loop would."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny).eval()
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    for chosen in (
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.3, "top_k": 12, "min_p": 0.02},
        {"temperature": 1.0, "repetition_penalty": 1.3},
        {"repetition_penalty": 1.2},
    ):
        torch.manual_seed(7)
        options = {"top_k": 0, "top_p": 1.0, **chosen}
        if "temperature" not in chosen:
            options = {"repetition_penalty": 1.2}
        expected = model.generate(
            prompt,
            do_sample="temperature" in chosen,
            max_new_tokens=20,
            min_new_tokens=20,
            eos_token_id=None,
            **options,
        )[0, 5:].tolist()
        sampler, ids = Sampler(Sampling(seed=7, **chosen), prompt), prompt
        for token in expected:
            with torch.no_grad():
                choice = sampler.choose(model(ids).logits[0, -1])
            assert choice.token == token, chosen
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


def test_penalties_biases_and_probabilities() -> None:
    logits = torch.tensor([1.0, 0.9, 0.0])
    sampler = Sampler(Sampling(presence_penalty=0.2), torch.tensor([0]), top_logprobs=2)
    first, second = sampler.choose(logits), sampler.choose(logits)
    assert (first.token, second.token) == (0, 1), "what was said already is less likely, prompts do not count"
    assert first.logprob == pytest.approx(float(logits.log_softmax(0)[0]))
    assert [token for token, _ in first.top] == [0, 1]
    assert Sampler(Sampling(logit_bias={2: 100.0}), torch.tensor([0])).choose(logits).token == 2
    for wrong in ({"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"min_p": 2}, {"repetition_penalty": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Sampling(**wrong)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_results_that_are_no_numbers_are_the_servers_fault(temperature: float, bad: float) -> None:
    sampler = Sampler(Sampling(temperature=temperature), torch.tensor([0]))
    with pytest.raises(ServerFault, match="are no numbers"):
        sampler.choose(torch.tensor([0.5, bad, 1.0]))


async def test_callers_take_turns() -> None:
    queue, served = Queue(places=1, waiting=10, patience_s=10), []

    async def ask(name: str) -> None:
        async with queue.place(name):
            served.append(name)
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        for name in ("greedy", "greedy", "greedy", "modest"):
            group.create_task(ask(name))
    assert served == ["greedy", "greedy", "modest", "greedy"], "of those who wait, each caller in turn"
    assert (queue.running, queue.waiting) == (0, 0)


async def test_the_queue_ends_somewhere_and_loses_no_place() -> None:
    queue = Queue(places=1, waiting=2, patience_s=0.05)
    async with queue.place("first"):
        waiting = asyncio.create_task(queue.place("a").__aenter__())
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):  # half of those who wait may be one caller's
            async with queue.place("a"):
                pass
        also = asyncio.create_task(queue.place("b").__aenter__())
        await asyncio.sleep(0)
        with pytest.raises(QueueFull, match="2 wait") as full:
            async with queue.place("c"):
                pass
        assert full.value.retry_after_s >= 1
        also.cancel()
        with pytest.raises(QueueFull, match=r"within 0\.05 s"):
            await waiting
    async with queue.place("later"):
        assert (queue.running, queue.waiting) == (1, 0)


async def test_a_place_given_to_one_who_has_just_left_goes_on_to_the_next() -> None:
    queue, served = Queue(places=1, waiting=10, patience_s=10), []

    async def ask(name: str) -> None:
        async with queue.place(name):
            served.append(name)

    async with queue.place("first"):
        leaves = asyncio.create_task(ask("leaves"))
        stays = asyncio.create_task(ask("stays"))
        await asyncio.sleep(0)
    leaves.cancel()  # its turn has come in this very moment
    await asyncio.wait([leaves, stays])
    assert served[-1] == "stays"
    assert queue.running == 0


def test_an_allowance_is_saved_up_for_a_minute() -> None:
    allowance = Allowance(60, now=0)
    allowance.take(60, now=0)
    assert allowance.wait_s(1, now=0) == pytest.approx(1)
    assert allowance.wait_s(1, now=1) == 0
    allowance.take(100, now=1)  # an answer that became longer than allowed is owed
    assert allowance.wait_s(1, now=1) == pytest.approx(100)
    assert allowance.wait_s(1, now=10_000) == 0
    assert allowance.wait_s(1000, now=10_000) == 0, "what no minute has would never be allowed"
    assert allowance.is_full(10_000)


def test_keys() -> None:
    callers = Callers([Key("alice", "sk-alice-1", requests_per_minute=2), Key("bob", "sk-bob-2")])
    assert callers.caller("sk-alice-1", "1.2.3.4", 0) is callers.caller("sk-alice-1", "5.6.7.8", 0)
    assert callers.caller(None, "1.2.3.4", 0) is None
    assert callers.caller("sk-alice", "1.2.3.4", 0) is None
    anybody = Callers(None, requests_per_minute=1)
    one, other = anybody.caller(None, "1.2.3.4", 0), anybody.caller("whatever", "5.6.7.8", 0)
    assert one is not None and other is not None and one is not other
    assert one.requests is not None
    one.requests.take(1, 0)
    assert one.wait_s(0) == pytest.approx(60)
    assert other.wait_s(0) == 0


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "names no API key"),
        ("[a]\nkey = 'short'", "at least 8"),
        ("[a]\nkey = 'long enough'\ncolour = 1", "colour"),
        ("[a]\nkey = 'long enough'\nrequests_per_minute = 0", "above 0"),
        ("[a]\nkey = 'long enough'\n[b]\nkey = 'long enough'", "two names"),
        ("[a", "TOML"),
    ],
)
def test_a_file_of_keys_that_is_wrong_says_where(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=complaint):
        read_keys(path)


def test_a_file_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text("[alice]\nkey = 'sk-alice-1'\ntokens_per_minute = 100\n[bob]\nkey = 'sk-bob-22'\n")
    assert read_keys(path) == (Key("alice", "sk-alice-1", None, 100), Key("bob", "sk-bob-22"))
