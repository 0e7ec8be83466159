"""Beginnings have names; what a server knows by name is recalled, not sent; and whoever forgets says so."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_admission import END, MODEL, load, request, states, step, table_for
from test_faults import Opener, stranger

from swarm.commands.local_swarm import LocalPeer, LocalSwarm
from swarm.errors import Forgotten
from swarm.models import Span, open_checkpoint
from swarm.models.paged_cache import PagePool
from swarm.page_names import PAGE, Content, name_of, names_of, part_of
from swarm.protocol.messages import Opened, Recall, Step
from swarm.protocol.routed_actions import Delivered, OpenHop, Place, ToHop
from swarm.protocol.routed_session import RoutedSession
from swarm.protocol.served_actions import Work
from swarm.server.sessions import SessionTable
from swarm.transport.watched_stream import WatchedStream

HIDDEN = 4


def random_states(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


# names


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6))
@settings(deadline=None, max_examples=60)
def test_pages_are_called_the_same_whatever_parts_they_came_in(lengths: list[int]) -> None:
    whole = random_states(sum(lengths))
    names = names_of(list(whole.split(lengths)), 99)
    assert names == names_of([whole], 99)
    assert len(names) == len(set(names)) == len(whole) // PAGE
    assert names_of([whole], 1) == names[:1]


def test_a_name_stands_for_all_before_it() -> None:
    one, other = random_states(4 * PAGE), random_states(4 * PAGE)
    other[PAGE] += 1e-6
    same = [a == b for a, b in zip(names_of([one], 9), names_of([other], 9), strict=True)]
    assert same == [True, False, False, False]


def test_other_position_ids_make_another_name() -> None:
    page, ids = random_states(PAGE), torch.arange(PAGE)
    names = {name_of(b"", [Content(ids + shift, page)]) for shift in range(2)}
    assert len(names) == 2 and names_of([page], 1)[0] in names


def test_parts_of_content_are_what_they_say() -> None:
    content = [Content(torch.arange(at, at + 5), random_states(5, at)) for at in (0, 5)]
    assert [len(one) for one in part_of(content, 3, 7)] == [2, 2]
    assert torch.equal(torch.cat([one.ids for one in part_of(content, 3, 7)]), torch.arange(3, 7))


# what a client recalls


def opened(
    known: int, pieces: list[tuple[torch.Tensor, int | None]], answers: str = "float32", **options: Any
) -> tuple[list[bytes], list[Any]]:
    """(names that the server was asked for, what the client does once the server has said what it knows)"""
    client = RoutedSession(1, HIDDEN, lambda: secrets.token_hex(16), **options)
    position = 0
    for piece, wanted in pieces:
        client.submit(position, None, piece, None, None, wanted)
        position += piece.shape[1]
    (action,) = client.route_found((Place("a", 0, 1),))
    assert isinstance(action, OpenHop)
    return list(action.prefix), client.received(action.hop, Opened(dtype=answers, known=known), {})


def recalled(actions: list[Any]) -> tuple[list[int], list[tuple[int, int]], int]:
    """(positions that are recalled, (position, length) of the steps that are sent, how many are delivered)"""
    sent = [one for one in actions if isinstance(one, ToHop)]
    steps = [
        (one.message.position, one.tensors["hidden_states"].shape[1])
        for one in sent if isinstance(one.message, Step) and one.tensors is not None
    ]  # fmt: skip
    done = [one for one in actions if isinstance(one, Delivered)]
    assert all(one.hidden_states.shape[1] == 0 for one in done)
    return [one.message.positions for one in sent if isinstance(one.message, Recall)], steps, len(done)


PROMPT = random_states(70).unsqueeze(0)
PIECES: list[tuple[torch.Tensor, int | None]] = [(PROMPT[:, :30], 0), (PROMPT[:, 30:60], 0), (PROMPT[:, 60:], 1)]


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        (0, ([], [(0, 30), (30, 30), (60, 10)], 0)),
        (1, ([16], [(16, 14), (30, 30), (60, 10)], 0)),
        (3, ([48], [(48, 12), (60, 10)], 1)),
        (4, ([64], [(64, 6)], 2)),
        (1000, ([64], [(64, 6)], 2)),
    ],
)
def test_what_the_server_knows_is_not_sent(known: int, expected: object) -> None:
    names, actions = opened(known, PIECES)
    assert names == names_of([PROMPT[0]], 99)
    assert recalled(actions) == expected


def test_of_what_is_wanted_nothing_is_recalled() -> None:
    assert recalled(opened(4, [(PROMPT, None)])[1]) == ([], [(0, 70)], 0)
    assert recalled(opened(4, [(PROMPT, 30)])[1]) == ([32], [(32, 38)], 0)
    assert recalled(opened(4, [(PROMPT[:, :40], 1), (PROMPT[:, 40:], 1)])[1]) == ([32], [(32, 8), (40, 30)], 0)


def test_a_server_of_another_precision_is_told_everything() -> None:
    assert recalled(opened(4, PIECES, answers="bfloat16")[1])[0] == []
    names, actions = opened(4, PIECES, answers="bfloat16", dtype=torch.bfloat16)
    assert names == names_of([PROMPT[0].bfloat16()], 99) and recalled(actions)[0] == [64]


def test_what_is_not_one_exact_sequence_has_no_names() -> None:
    assert opened(4, [(PROMPT.expand(2, -1, -1), 1)])[0] == []
    assert opened(4, PIECES, codec="int8")[0] == []


# what a server knows


@pytest.fixture(scope="module")
def span(tmp_path_factory: pytest.TempPathFactory) -> Span:
    return load("llama", tmp_path_factory.mktemp("llama"))


def recall(positions: int) -> Work:
    message = Recall(sequence=1, positions=positions, last=True)
    return Work(0, None, torch.empty(1, 0, 64), None, None, message)


def test_what_one_session_computed_another_recalls_and_goes_on(span: Span) -> None:
    table, prompt = table_for(span), states(1, 45)
    first, second = (table.open(request(max_length=60)) for _ in range(2))
    output = first.run(step(prompt, 0))
    assert second.begins_with(names_of([prompt[0]], 99)) == 32
    second.hold_prefix()
    assert torch.equal(second.run(recall(32)), output[:, :32])
    assert torch.equal(second.run(step(prompt[:, 32:], 32)), output[:, 32:])
    assert second.names_for_next() == names_of([output[0]], 99)


def test_a_session_recalls_less_than_it_could_or_nothing(span: Span) -> None:
    table, prompt = table_for(span), states(1, 48)
    output = table.open(request(max_length=48)).run(step(prompt, 0))
    less, nothing = (table.open(request(max_length=48)) for _ in range(2))
    for session in (less, nothing):
        assert session.begins_with(names_of([prompt[0]], 99)) == 48
        session.hold_prefix()
    assert torch.equal(less.run(recall(16)), output[:, :16])
    assert torch.equal(less.run(step(prompt[:, 16:], 16)), output[:, 16:])
    other = states(1, 20, seed=7)
    assert torch.equal(nothing.run(step(other, 0)), table_for(span).open(request(max_length=48)).run(step(other, 0)))


@pytest.mark.parametrize("case", ["other blocks", "two sequences", "a short session", "no reuse", "other states"])
def test_nothing_is_known_to_whom_it_is_of_no_use(case: str, span: Span) -> None:
    table, prompt = table_for(span), states(1, 40)
    table.open(request(max_length=40)).run(step(prompt, 0))
    names = names_of([prompt[0]], 99)
    assert len(names) == 2
    match case:
        case "other blocks":
            assert table.open(request(max_length=40, end=END - 1)).begins_with(names) == 0
        case "two sequences":
            assert table.open(request(batch=2, max_length=40)).begins_with(names) == 0
        case "a short session":
            assert table.open(request(max_length=31)).begins_with(names) == 16
        case "no reuse":
            careful = SessionTable(span, MODEL, PagePool.for_span(span, 64, 9), 8, reuses=False)
            careful.open(request(max_length=40)).run(step(prompt, 0))
            assert careful.open(request(max_length=40)).begins_with(names) == 0
        case _:
            assert table.open(request(max_length=40)).begins_with(names_of([states(1, 40, seed=1)[0]], 99)) == 0


@pytest.mark.parametrize("holds", [False, True])
def test_what_is_held_is_not_forgotten_and_what_is_forgotten_is_not_made_up(holds: bool, span: Span) -> None:
    table, prompt = table_for(span, pages=6), states(1, 32)
    first = table.open(request(max_length=32))
    output = first.run(step(prompt, 0))
    first.cache.release()
    table.close(first)
    session = table.open(request(max_length=48))
    assert session.begins_with(names_of([prompt[0]], 99)) == 32
    if holds:
        session.hold_prefix()
    others = table.open(request(max_length=48))
    others.run(step(states(1, 48, seed=1), 0))
    if not holds:  # and others take the rest
        others.cache.release()
        session.cache.release()
        for _ in range(6):
            session.cache.pool.pages.take()
        with pytest.raises(Forgotten, match="32 positions"):
            session.run(recall(32))
        return
    assert torch.equal(session.run(recall(32)), output)


# among processes


class Overheard:
    """What clients of this process send, by type of message, and bytes of hidden states."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recalls, self.positions = 0, 0
        send = WatchedStream.send

        def overhear(stream: WatchedStream, message: Any, tensors: Any = None) -> None:
            self.recalls += isinstance(message, Recall)
            self.positions += tensors["hidden_states"].shape[1] if tensors else 0
            send(stream, message, tensors)

        monkeypatch.setattr(WatchedStream, "send", overhear)


@pytest.fixture(scope="module")
def servers(swarm: LocalSwarm, tiny: str) -> list[LocalPeer]:
    return swarm.start_servers(tiny, ["0:2", "2:4"], "--threads", "1")


def prefill(model: Any, prompt: torch.Tensor) -> torch.Tensor:
    with model.inference_session(max_length=prompt.shape[1]) as session:
        output: torch.Tensor = session.step(prompt, wanted=1)
    return output


@pytest.mark.parametrize(("chain", "seed"), [(True, 1), (False, 2)])
def test_a_prompt_that_servers_know_is_not_sent_again(
    chain: bool, seed: int, servers: list[LocalPeer], tiny: str, connect: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model, prompt = connect(tiny, chain=chain), states(1, 300, seed=seed)
    before = prefill(model, prompt)
    overheard = Overheard(monkeypatch)
    torch.testing.assert_close(prefill(model, prompt), before, atol=1e-4, rtol=1e-4)
    assert overheard.recalls == 1
    assert overheard.positions == (12 if chain else 312)  # of 300, 288 are on full pages; a star relays the outputs


def test_who_comes_at_the_same_time_waits_for_the_first_and_recalls(
    servers: list[LocalPeer], tiny: str, connect: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompt = connect(tiny), states(1, 300, seed=3)
    prefill(model, states(1, 3))  # it knows its servers
    overheard = Overheard(monkeypatch)
    with ThreadPoolExecutor(5) as pool:
        found = list(pool.map(lambda _: prefill(model, prompt), range(5)))
    for one in found:
        torch.testing.assert_close(one, found[0], atol=1e-4, rtol=1e-4)
    assert overheard.recalls == 4


async def test_nobody_waits_long_for_who_promised_a_beginning_and_says_nothing(
    servers: list[LocalPeer], tiny: str, connect: Callable[..., Any]
) -> None:
    model, prompt = connect(tiny), states(1, 300, seed=4)
    prefill(model, states(1, 3))
    digest = open_checkpoint(tiny).model_digest
    async with stranger() as node:
        names = names_of([prompt[0]], 99)
        silent = await Opener(node, servers[0], digest, end=2, max_length=300, prefix=names).open()
        begun = time.monotonic()
        await asyncio.to_thread(prefill, model, prompt)
        assert time.monotonic() - begun < 5
        await silent.close()
