"""The commands as a person and a script use them, on real processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
from conftest import SmolLM2, obey_ctrl_c
from warm_start import WarmLoopback

from swarm.commands.local_swarm import LocalSwarm

MAIN = "swarm.commands.main"


def run(*arguments: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """``swarm …``, started as people start it."""
    return subprocess.run([sys.executable, "-m", MAIN, *arguments], capture_output=True, text=True, timeout=timeout_s)


def last_object(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def serving(swarm: LocalSwarm) -> LocalSwarm:
    swarm.start_servers("smollm2", ["0:20", "20:30"], "--threads", "1")
    return swarm


@pytest.mark.parametrize(
    "command", ["", "demo", "generate", "chat", "status", "bootstrap", "health", "simulate", "digest", "moefy"]
)
def test_help_explains(command: str) -> None:
    result = run(*command.split(), "--help")
    assert result.returncode == 0
    assert "usage: swarm" in result.stdout


def test_the_demo_kills_a_server_and_the_tokens_stay_the_same(smollm2: SmolLM2) -> None:
    result = run("demo", "--json", "--max-new-tokens", "48", timeout_s=240)
    figures = last_object(result.stdout)
    assert result.returncode == 0
    assert figures["identical"] is True
    assert figures["killed_servers"] >= 1
    assert figures["recoveries"] >= 1
    assert 0 < figures["pause_s"] < 10
    assert figures["swarm_tokens_per_s"] > 0 and figures["local_tokens_per_s"] > 0
    assert "identical:  yes" in result.stderr


class Interruptible:
    """``swarm …`` in a session of its own, which can get Ctrl-C as a terminal would send it."""

    def __init__(self, *arguments: str) -> None:
        self._mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [sys.executable, "-m", "swarm.commands.main", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,  # nothing that it says is lost between reading it ourselves and communicate()
            env={**os.environ, "SWARM_TEST_MARK": self._mark},
            start_new_session=True,
            preexec_fn=obey_ctrl_c,
        )
        self._said = b""

    @property
    def said(self) -> str:
        return self._said.decode()

    def alive(self) -> list[psutil.Process]:
        """The process and all that descends from it, orphans included: they inherit the mark."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SWARM_TEST_MARK") == self._mark:
                    found.append(process)
        return found

    def wait_until_it_says(self, words: str) -> None:
        assert self.process.stdout is not None
        while words.encode() not in self._said:
            byte = self.process.stdout.read(1)
            assert byte, f"it ended with code {self.process.wait()}, having said {self.said!r}"
            self._said += byte

    def wait_until_there_are(self, processes: int) -> None:
        deadline = time.monotonic() + 60
        while (alive := len(self.alive())) != processes:
            assert time.monotonic() < deadline, f"there are {alive} processes"
            time.sleep(0.05)

    def interrupt(self) -> int:
        """Ctrl-C; returns the exit code."""
        os.killpg(self.process.pid, signal.SIGINT)
        rest, _ = self.process.communicate(timeout=30)
        self._said += rest
        return self.process.returncode

    def end(self) -> None:
        for process in self.alive():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.communicate()


@pytest.fixture
def interruptible() -> Iterator[Callable[..., Interruptible]]:
    started: list[Interruptible] = []

    def start(*arguments: str) -> Interruptible:
        started.append(Interruptible(*arguments))
        return started[-1]

    yield start
    for one in started:
        one.end()


def test_ctrl_c_ends_a_bootstrap_peer_cleanly(interruptible: Callable[..., Interruptible]) -> None:
    bootstrap = interruptible("bootstrap", "--host", "127.0.0.1")
    bootstrap.wait_until_it_says("Press Ctrl-C to stop.")
    bootstrap.wait_until_there_are(2)  # it and its p2pd
    assert bootstrap.interrupt() == 0
    assert bootstrap.said.endswith("Press Ctrl-C to stop.\nLeft the swarm.\n")
    bootstrap.wait_until_there_are(0)


@pytest.mark.parametrize("moment", ["servers start", pytest.param("the answer begins", marks=pytest.mark.soak)])
def test_ctrl_c_ends_the_demo_cleanly(moment: str, interruptible: Callable[..., Interruptible]) -> None:
    demo = interruptible("demo", "--max-new-tokens", "400")
    if moment == "servers start":
        demo.wait_until_it_says("Starting servers")
        demo.wait_until_there_are(7)  # the demo, the bootstrap peer and its p2pd, four servers
    else:
        demo.wait_until_it_says("Answer, through the swarm: ")
    assert demo.interrupt() == 130
    assert demo.said.endswith("interrupted\n") and "Traceback" not in demo.said
    demo.wait_until_there_are(0)


def test_generate_prints_the_local_models_text(serving: LocalSwarm, smollm2: SmolLM2) -> None:
    peers = ["--initial-peers", *serving.initial_peers]
    result = run("generate", "smollm2", *peers, "--prompt", "The sea is", "--max-new-tokens", "12", "--json")
    inputs = smollm2.tokenizer("The sea is", return_tensors="pt")
    expected = smollm2.whole.generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
    assert result.returncode == 0, result.stderr
    answer = last_object(result.stdout)
    assert answer["token_ids"] == expected.tolist()
    assert answer["text"] == smollm2.tokenizer.decode(expected, skip_special_tokens=True)
    assert [(leg["start"], leg["end"]) for leg in answer["route"]] == [(0, 20), (20, 30)]


def test_chat_answers_every_line_of_a_pipe_as_the_local_model_would(
    warm: WarmLoopback, serving: LocalSwarm, smollm2: SmolLM2
) -> None:
    options = ["--initial-peers", *serving.initial_peers, "--max-new-tokens", "10", "--json"]
    result = warm.run(MAIN, "chat", "smollm2", *options, input_="Name one colour.\nName another.\n/quit\n")
    assert result.returncode == 0, result.stderr
    first, second = (json.loads(line) for line in result.stdout.splitlines())
    expected_1 = smollm2.greedy("Name one colour.", 10)
    inputs = smollm2.chat("Name one colour.", first["answer"], "Name another.")
    expected_2 = smollm2.whole.generate(**inputs, do_sample=False, max_new_tokens=10)
    prompt_1 = smollm2.chat("Name one colour.")["input_ids"].shape[1]
    prompt_2 = inputs["input_ids"].shape[1]
    assert expected_1[0, prompt_1:].tolist()[:4] == smollm2.tokenizer(first["answer"])["input_ids"][:4]
    assert second["answer"] == smollm2.tokenizer.decode(expected_2[0, prompt_2:], skip_special_tokens=True)


def test_status_shows_blocks_and_servers(warm: WarmLoopback, serving: LocalSwarm) -> None:
    result = warm.run(MAIN, "status", "smollm2", "--initial-peers", *serving.initial_peers, "--json")
    status = last_object(result.stdout)
    assert result.returncode == 0
    assert status["complete"] is True
    assert status["redundancy"] == [1] * 30
    assert {server["peer_id"] for server in status["servers"]} == {peer.peer_id for peer in serving.servers}
    assert "Complete: every block has 1 or more servers" in result.stderr


def test_watching_shows_a_server_that_comes_and_one_that_dies_and_ends_with_ctrl_c(
    swarm: LocalSwarm, tiny: str
) -> None:
    first = swarm.start_server(tiny, "--blocks", "0:4")
    watching = subprocess.Popen(
        [sys.executable, "-m", "swarm.commands.main", "status", tiny, "--watch", "--every", "0.5", "--json"]
        + ["--initial-peers", *swarm.initial_peers],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=obey_ctrl_c,
    )
    assert watching.stdout is not None
    looks = (json.loads(line) for line in watching.stdout)
    assert next(looks)["redundancy"] == [1, 1, 1, 1]
    second = swarm.start_server(tiny, "--blocks", "2:4")
    come = next(look for look in looks if look["redundancy"] == [1, 1, 2, 2])
    assert len(come["servers"]) == 2
    first.process.kill()
    gone = next(look for look in looks if look["redundancy"] == [0, 0, 1, 1])
    assert gone["changes"] == [f"{first.peer_id[:8]}…{first.peer_id[-4:]} is gone: blocks 0–3"]
    assert gone["moves_seen"] == 0
    watching.send_signal(signal.SIGINT)
    assert watching.wait(timeout=20) == 0
    second.process.kill()


def test_status_of_a_model_that_nobody_hosts_says_so(
    warm: WarmLoopback, serving: LocalSwarm, tmp_path_factory: Any
) -> None:
    from tiny_models import save_tiny_model

    directory = tmp_path_factory.mktemp("lonely")
    save_tiny_model("mistral", directory)
    result = warm.run(MAIN, "status", str(directory), "--initial-peers", *serving.initial_peers)
    assert result.returncode == 3
    assert "INCOMPLETE: no server is online for 4 of 4 blocks: 0–3" in result.stdout


def test_digest_writes_a_manifest_that_servers_check(warm: WarmLoopback, tmp_path_factory: Any) -> None:
    from tiny_models import save_tiny_model

    directory = tmp_path_factory.mktemp("digest")
    save_tiny_model("llama", directory)
    result = warm.run(MAIN, "digest", str(directory), "--write", "--json")
    assert result.returncode == 0, result.stderr
    manifest = json.loads((directory / "swarm-digests.json").read_text())
    assert last_object(result.stdout)["blocks"] == manifest["blocks"]


def test_errors_are_one_clear_sentence_and_a_code(warm: WarmLoopback, serving: LocalSwarm) -> None:
    nobody = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWRE8mzAbLiPHb17uqHkoab9NUSjfeswJvYjvTuAVikvKg"
    result = warm.run(MAIN, "generate", "smollm2", "--initial-peers", nobody, "--prompt", "Hi")
    assert result.returncode == 1
    assert result.stderr.startswith("error: None of the initial peers answered")
    assert "Traceback" not in result.stderr
    unknown = warm.run(MAIN, "generate", "smollm3000", "--initial-peers", *serving.initial_peers, "--prompt", "Hi")
    assert "There is no model 'smollm3000'" in unknown.stderr
