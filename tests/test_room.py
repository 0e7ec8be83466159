"""A server that is full is waited for: nobody is killed, all finish, and the server stays within its memory."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from test_faults import Opener, stranger
from tiny_models import tiny_model
from watched_memory import watching_memory

from swarm.client.waiting_line import WaitingLine
from swarm.commands.local_swarm import LocalPeer, LocalSwarm
from swarm.errors import NoRoom
from swarm.models import open_checkpoint
from swarm.server.crowd import Crowd

FITTING = 4
LENGTH = 48
PROMPT = 8
CAP_MIB = 700
MIB = 1024**2


@pytest.fixture(scope="module")
def whole() -> Any:
    """The same, here."""
    return tiny_model("llama").eval()


@pytest.fixture(scope="module")
def servers(swarm: LocalSwarm, tiny: str) -> list[LocalPeer]:
    """Two, in a chain, each with room for a few sessions."""
    room = ("--kv-tokens", str(FITTING * LENGTH + LENGTH // 2), "--memory", f"{CAP_MIB}MiB", "--threads", "1")
    return swarm.start_servers(tiny, ["0:2", "2:4"], *room)


def prompts(count: int) -> list[torch.Tensor]:
    return [torch.randint(3, 128, (1, PROMPT), generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def answer(model: Any, prompt: torch.Tensor, length: int = LENGTH, **options: Any) -> list[int]:
    new = length - prompt.shape[1]
    ids = model.generate(prompt, do_sample=False, max_new_tokens=new, min_new_tokens=new, **options)
    return ids[0].tolist()


class SlowReader:
    """A streamer that makes a session last."""

    def put(self, value: object) -> None:
        time.sleep(0.02)

    def end(self) -> None:
        pass


@pytest.mark.parametrize("clients", [1, 3], ids=["of one client", "of several clients"])
def test_three_times_the_sessions_that_fit_all_finish_and_the_server_keeps_to_its_memory(
    clients: int, servers: list[LocalPeer], tiny: str, whole: Any, connect: Callable[..., Any]
) -> None:
    models = [connect(tiny) for _ in range(clients)]
    asked = prompts(3 * FITTING)
    with watching_memory(servers) as highest, ThreadPoolExecutor(len(asked)) as pool:
        answers = [
            pool.submit(answer, models[index % clients], prompt, streamer=SlowReader())
            for index, prompt in enumerate(asked)
        ]
        found = [one.result() for one in answers]
    assert found == [answer(whole, prompt) for prompt in asked]
    assert len(highest) == 2 and max(highest.values()) / MIB < CAP_MIB


def test_a_session_that_could_never_fit_is_refused_at_once_and_told_what_would(
    servers: list[LocalPeer], tiny: str, connect: Callable[..., Any]
) -> None:
    model = connect(tiny)
    begun = time.monotonic()
    with pytest.raises(NoRoom, match=r"(?s)1 × 1025 positions .* than this server has in all: 224, .* shorter session"):
        model.inference_session(max_length=1025).step(torch.zeros(1, 1, 64))
    with pytest.raises(NoRoom, match="so 16 for each of 8"):
        model.generate(prompts(1)[0].expand(8, -1), max_new_tokens=30)
    assert time.monotonic() - begun < 5
    assert len(answer(model, prompts(1)[0])) == LENGTH


def test_who_waits_in_vain_learns_who_was_full_and_that_is_not_held_against_the_server(
    servers: list[LocalPeer], tiny: str, connect: Callable[..., Any]
) -> None:
    model = connect(tiny, room_deadline_s=2.0)
    full = FITTING * LENGTH
    with model.inference_session(max_length=full) as holder:
        holder.step(torch.zeros(1, 1, 64))
        begun = time.monotonic()
        with pytest.raises(NoRoom, match=r"(?s)full: 1 × 4\d positions .* the 32 that are free .*Waited 2 s") as error:
            answer(model, prompts(1)[0])
        assert 2 <= time.monotonic() - begun < 5
        assert any(server.peer_id in str(error.value) for server in servers)
        begun = time.monotonic()
        assert len(answer(model, prompts(1)[0], length=32)) == 32  # for that there is room, and nobody is shunned
        assert time.monotonic() - begun < 2


def test_a_session_that_waits_goes_on_as_soon_as_there_is_room(
    servers: list[LocalPeer], tiny: str, whole: Any, connect: Callable[..., Any]
) -> None:
    model = connect(tiny)
    holder = model.inference_session(max_length=FITTING * LENGTH)
    holder.step(torch.zeros(1, 1, 64))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(answer, model, prompts(1)[0])
        with pytest.raises(TimeoutError):
            waiting.result(timeout=2.5)
        holder.close()
        closed = time.monotonic()
        assert waiting.result(timeout=10) == answer(whole, prompts(1)[0])
        assert time.monotonic() - closed < 3


def test_a_session_that_grows_where_there_is_no_room_waits_and_keeps_its_tokens(
    servers: list[LocalPeer], tiny: str, whole: Any, connect: Callable[..., Any]
) -> None:
    model = connect(tiny)
    prompt = prompts(1)[0]
    other = model.inference_session(max_length=FITTING * LENGTH)
    other.step(torch.zeros(1, 1, 64))
    with model.inference_session(max_length=PROMPT + 4) as session, ThreadPoolExecutor(1) as pool:
        growing = pool.submit(answer, model, prompt, session=session)
        with pytest.raises(TimeoutError):
            growing.result(timeout=2.5)
        other.close()
        assert growing.result(timeout=20) == answer(whole, prompt)


def test_another_server_that_has_room_is_preferred(
    servers: list[LocalPeer], swarm: LocalSwarm, tiny: str, connect: Callable[..., Any]
) -> None:
    model = connect(tiny)
    with model.inference_session(max_length=FITTING * LENGTH) as holder:
        holder.step(torch.zeros(1, 1, 64))
        spare = swarm.start_server(tiny, "--blocks", "0:4", "--kv-tokens", "2048", "--threads", "1")
        try:
            begun = time.monotonic()
            with model.inference_session(max_length=LENGTH) as session:
                session.step(torch.zeros(1, 1, 64))
                assert [leg.peer_id for leg in session.route] == [spare.peer_id]
            assert time.monotonic() - begun < 8
        finally:
            spare.process.terminate()
            spare.process.wait()
            swarm.servers.remove(spare)


async def test_a_full_server_says_when_to_ask_again(servers: list[LocalPeer], tiny: str) -> None:
    digest = open_checkpoint(tiny).model_digest
    async with stranger() as node:
        first = await Opener(node, servers[0], digest, end=2, max_length=200).open()
        second = Opener(node, servers[0], digest, end=2, max_length=100, session=secrets.token_hex(16))
        refusal, _ = await second.hear()
        assert refusal.code == "cache_full" and 1 <= refusal.retry_after_s < 10
        assert await second.hung_up()
        await first.close()


def test_the_larger_the_crowd_the_later_it_is_asked_to_come_back() -> None:
    crowd = Crowd()
    assert {crowd.retry_after_s(now=0.0) for _ in range(20)} == {1.0}
    assert [crowd.retry_after_s(now=1.0) for _ in range(80)][-1] == 5.0
    assert crowd.retry_after_s(now=100.0) == 1.0


async def test_the_line_is_served_in_order_and_those_who_leave_it_hold_nobody_up() -> None:
    line = WaitingLine()
    assert line.is_first("a")
    for session in "abca":
        line.join(session)
    assert [line.is_first(session) for session in "abcx"] == [True, False, False, False]
    served: list[str] = []

    async def queue(session: str) -> None:
        while not line.is_first(session):
            await line.wait(session, 10)
        served.append(session)
        line.leave(session)

    waiting = [asyncio.create_task(queue(session)) for session in "cb"]
    await asyncio.sleep(0)
    line.leave("a")
    async with asyncio.timeout(5):
        await asyncio.gather(*waiting)
    assert served == ["b", "c"] and line.is_first("x")
