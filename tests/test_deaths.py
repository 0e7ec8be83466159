"""Servers die in every way while a real model answers through them; the tokens stay the local model's."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import QUESTION, SmolLM2

from swarm.commands.local_swarm import LocalPeer, LocalSwarm

SPANS = ["0:10", "10:20", "20:30"]
TOKENS = 40


@pytest.fixture(scope="module")
def model(swarm: LocalSwarm, connect: Callable[..., Any]) -> Any:
    swarm.start_servers("smollm2", SPANS + SPANS, "--threads", "1")
    return connect("smollm2")


@pytest.fixture(autouse=True)
def two_servers_for_every_span(swarm: LocalSwarm, model: Any) -> Iterator[None]:
    """Replace, before the next test, whatever a test has killed."""
    yield
    alive = [peer for peer in swarm.servers if peer.process.poll() is None]
    hosted = [(peer.ready["start"], peer.ready["end"]) for peer in alive if peer.ready]
    missing = [span for span in SPANS for _ in range(2 - hosted.count(tuple(map(int, span.split(":")))))]  # type: ignore[arg-type]
    swarm.start_servers("smollm2", missing, "--threads", "1")


class AtToken:
    """A streamer that acts when so many new tokens are there."""

    def __init__(self, actions: dict[int, Callable[[], None]]) -> None:
        self._count, self._actions = -1, actions  # the prompt comes first

    def put(self, value: object) -> None:
        self._count += 1
        self._actions.get(self._count, lambda: None)()

    def end(self) -> None:
        pass


def answer(
    model: Any, smollm2: SmolLM2, act: Callable[[Any], None], late: Callable[[Any], None] = lambda _: None
) -> tuple[Any, Any]:
    """Generate, calling `act(session)` on the way, and `late(session)` near the end; returns (token ids, session)."""
    with model.inference_session(max_length=256) as session:
        streamer = AtToken({15: lambda: act(session), 35: lambda: late(session)})
        ids = model.generate(
            **smollm2.chat(QUESTION),
            session=session,
            streamer=streamer,
            do_sample=False,
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
        )
    return ids, session


def settle_route(session: Any, model: Any, smollm2: SmolLM2) -> None:
    """Take a step and forget it, so that the victim is known before the work begins."""
    session.step(model.get_input_embeddings()(smollm2.chat("Hi")["input_ids"]))
    session.position = 0


def server_of(swarm: LocalSwarm, session: Any, hop: int) -> LocalPeer:
    return swarm.server(session.route[hop].peer_id)


@pytest.mark.parametrize("hop", [0, 1, 2], ids=["first", "middle", "last"])
def test_tokens_survive_sigkill_of_a_server(
    hop: int, swarm: LocalSwarm, model: Any, smollm2: SmolLM2, record_property: Callable[[str, object], None]
) -> None:
    ids, session = answer(model, smollm2, lambda session: server_of(swarm, session, hop).kill())
    assert ids.tolist() == smollm2.greedy(QUESTION, TOKENS).tolist()
    assert [(lost.start, lost.end) for lost in session.recoveries] == [(10 * hop, 10 * hop + 10)]
    assert session.recoveries[0].pause_s < 10
    record_property("pause_s", session.recoveries[0].pause_s)


def test_tokens_survive_sigkill_of_two_adjacent_servers_at_once(
    swarm: LocalSwarm, model: Any, smollm2: SmolLM2
) -> None:
    def kill_both(session: Any) -> None:
        victims = [server_of(swarm, session, hop) for hop in (0, 1)]
        for victim in victims:
            victim.process.kill()

    ids, session = answer(model, smollm2, kill_both)
    assert ids.tolist() == smollm2.greedy(QUESTION, TOKENS).tolist()
    assert len(session.recoveries) == 2


def test_tokens_survive_sigkill_during_prefill(swarm: LocalSwarm, model: Any, smollm2: SmolLM2) -> None:
    long_question = "Count the words of this text. " + "The sea is wide and the wind is cold. " * 60
    expected = smollm2.greedy(long_question, 8)
    with model.inference_session(max_length=1024) as session:
        settle_route(session, model, smollm2)
        victim = server_of(swarm, session, 1)
        os.kill(victim.process.pid, signal.SIGSTOP)  # it cannot answer its part of the prefill any more
        killer = threading.Timer(2.0, victim.kill)
        killer.start()
        ids = model.generate(
            **smollm2.chat(long_question), session=session, do_sample=False, max_new_tokens=8, min_new_tokens=8
        )
        killer.join()
    assert ids.tolist() == expected.tolist()
    assert [lost.replayed_positions for lost in session.recoveries] == [0]


def test_tokens_survive_a_frozen_server(swarm: LocalSwarm, model: Any, smollm2: SmolLM2) -> None:
    frozen: list[LocalPeer] = []

    def freeze(session: Any) -> None:
        frozen.append(server_of(swarm, session, 2))
        frozen[0].signal(signal.SIGSTOP)

    ids, session = answer(model, smollm2, freeze)
    frozen[0].kill()
    assert ids.tolist() == smollm2.greedy(QUESTION, TOKENS).tolist()
    assert "silent" in session.recoveries[0].reason


def test_tokens_survive_a_death_during_the_recovery_from_another(
    swarm: LocalSwarm, model: Any, smollm2: SmolLM2
) -> None:
    replacements: list[LocalPeer] = []

    def kill_and_then_kill_the_replacement(session: Any) -> None:
        victim = server_of(swarm, session, 1)
        (spare,) = (peer for peer in servers_of(swarm, 10) if peer is not victim)
        spare.signal(signal.SIGSTOP)  # the recovery will hang on it …
        victim.kill()
        threading.Timer(1.0, spare.kill).start()  # … until it dies, too
        replacements.append(swarm.start_server("smollm2", "--blocks", "10:20", "--threads", "1", wait=False))

    ids, session = answer(model, smollm2, kill_and_then_kill_the_replacement)
    assert ids.tolist() == smollm2.greedy(QUESTION, TOKENS).tolist()
    replacements[0].wait_until_ready()
    assert session.recoveries[0].pause_s > 1.0


def test_a_server_that_leaves_politely_hands_its_sessions_over(swarm: LocalSwarm, model: Any, smollm2: SmolLM2) -> None:
    leaver: list[LocalPeer] = []

    def ask_to_leave(session: Any) -> None:
        leaver.append(server_of(swarm, session, 0))
        leaver[0].signal(signal.SIGTERM)

    def wait_for_the_hand_over(session: Any) -> None:  # should the tokens have been faster
        deadline = time.monotonic() + 30
        while not session.recoveries:
            assert time.monotonic() < deadline, "nobody took over"
            time.sleep(0.05)

    ids, session = answer(model, smollm2, ask_to_leave, wait_for_the_hand_over)
    assert ids.tolist() == smollm2.greedy(QUESTION, TOKENS).tolist()
    assert [lost.reason for lost in session.recoveries] == ["it is leaving"]
    assert leaver[0].process.wait(20) == 0


def test_beams_survive_a_death(swarm: LocalSwarm, model: Any, smollm2: SmolLM2) -> None:
    options = {"do_sample": False, "num_beams": 4, "max_new_tokens": 16}
    expected = smollm2.whole.generate(**smollm2.chat(QUESTION), **options)
    with model.inference_session(max_length=256) as session:
        steps = itertools.count(1)

        def kill_at_the_eighth_step(ids: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
            if next(steps) == 8:
                server_of(swarm, session, 1).kill()
            return torch.zeros(len(ids), dtype=torch.bool)

        ids = model.generate(
            **smollm2.chat(QUESTION), session=session, stopping_criteria=[kill_at_the_eighth_step], **options
        )
    assert ids.tolist() == expected.tolist()
    assert session.recoveries[0].replayed_positions > 0


def servers_of(swarm: LocalSwarm, start: int) -> list[LocalPeer]:
    """The living servers whose span begins at `start`."""
    alive = [peer for peer in swarm.servers if peer.process.poll() is None]
    return [peer for peer in alive if peer.ready and peer.ready["start"] == start]
