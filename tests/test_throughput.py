"""Servers say how fast they are: measured, remembered, announced and shown."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny_model
from warm_start import WarmLoopback

from swarm.client import ClientSettings, Network
from swarm.commands.local_swarm import LocalSwarm
from swarm.commands.speeds import compute_sentence, megabits, milliseconds, network_sentence
from swarm.dht import Announcement, State
from swarm.models import load_span, open_checkpoint
from swarm.models.together import way_together
from swarm.server.neighbours import NetworkSpeed
from swarm.server.throughput import BATCHES, MAX_SAMPLES, ComputeSpeed, best_s, measure_compute
from swarm.server.throughput_cache import DISTURBED_MAX_AGE_S, MAX_AGE_S, MeasuredOn, remember_speed, remembered_speed

HERE = MeasuredOn(
    device="a processor", threads=1, cores=2, model="ab" * 32, start=0, end=4, precision="float32", software=("1", "2")
)
SPEED = ComputeSpeed(588.0, {1: 28.4, 4: 52.2, 16: 91.4})
NOW = 1_700_000_000.0


# computing


def test_half_of_the_blocks_are_run_twice_as_often() -> None:
    assert SPEED.of_part(0.5) == ComputeSpeed(1176.0, {1: 56.8, 4: 104.4, 16: 182.8})


@pytest.mark.quiet
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "mistral", "mixtral", "gemma3_text", "falcon-alibi"])
def test_every_phase_is_measured_on_every_kind_of_model(family: str, tmp_path: Path) -> None:
    save_tiny_model(family, tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    span = load_span(checkpoint, 1, 3, dtype=torch.float32)
    together = way_together(span, checkpoint.hidden_size)
    speed = measure_compute(span, checkpoint.hidden_size, together)
    assert list(speed.decode_steps_per_s) == list(BATCHES)
    assert speed.prefill_tokens_per_s > speed.decode_steps_per_s[1] > 1
    assert speed.decode_steps_per_s[16] > speed.decode_steps_per_s[1] or together is None


def test_sessions_that_cannot_run_together_make_no_more_steps_than_one(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    speed = measure_compute(load_span(checkpoint, 0, 1, dtype=torch.float32), checkpoint.hidden_size, None)
    assert speed.decode_steps_per_s[1] == speed.decode_steps_per_s[4] == speed.decode_steps_per_s[16]


@pytest.mark.parametrize(("takes_s", "runs"), [(10.0, 1), (0.3, 3), (0.0, MAX_SAMPLES)])
def test_what_is_slow_is_measured_once_and_nothing_for_longer_than_the_budget(takes_s: float, runs: int) -> None:
    clock, found = [0.0], []

    def run() -> None:
        clock[0] += takes_s
        found.append(clock[0])

    assert best_s(run, 1.0, lambda: clock[0]) == pytest.approx(takes_s)
    assert len(found) == runs


# remembering


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SWARM_HOME", str(tmp_path))
    return tmp_path


def test_what_was_measured_is_remembered_for_a_week(home: Path) -> None:
    assert remembered_speed(HERE, NOW) is None
    remember_speed(HERE, SPEED, NOW)
    assert remembered_speed(HERE, NOW) == SPEED
    assert remembered_speed(HERE, NOW + MAX_AGE_S) == SPEED
    assert remembered_speed(HERE, NOW + MAX_AGE_S + 1) is None
    assert remembered_speed(HERE, NOW - 1) is None  # the clock was wrong, then or now


def test_what_was_measured_beside_other_work_is_remembered_for_an_hour(home: Path) -> None:
    disturbed = replace(SPEED, is_undisturbed=False)
    remember_speed(HERE, disturbed, NOW)
    assert remembered_speed(HERE, NOW + DISTURBED_MAX_AGE_S) == disturbed
    assert remembered_speed(HERE, NOW + DISTURBED_MAX_AGE_S + 1) is None


@pytest.mark.parametrize(
    "change",
    [{"device": "another"}, {"threads": 2}, {"cores": 4}, {"model": "cd" * 32}, {"start": 1}, {"end": 3},
     {"precision": "int8 weights, float32"}, {"software": ("1", "3")}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_it_holds_for_nothing_else(change: dict[str, object], home: Path) -> None:
    remember_speed(HERE, SPEED, NOW)
    assert remembered_speed(replace(HERE, **change), NOW) is None  # type: ignore[arg-type]


def damaged(change: Callable[[dict[str, object]], object]) -> Callable[[bytes], bytes]:
    def damage(written: bytes) -> bytes:
        fields = json.loads(written)
        change(fields)
        return json.dumps(fields).encode()

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda written: b"",
        lambda written: written[: len(written) // 2],
        lambda written: b"\xff\xfe" + written,
        lambda written: b"[1, 2, 3]",
        damaged(lambda fields: fields.pop("prefill_tokens_per_s")),
        damaged(lambda fields: fields.update(prefill_tokens_per_s=float("nan"))),
        damaged(lambda fields: fields.update(prefill_tokens_per_s=-1.0)),
        damaged(lambda fields: fields.update(decode_steps_per_s={"1": 5.0})),
        damaged(lambda fields: fields.update(decode_steps_per_s={"1": "x", "4": 1.0, "16": 1.0})),
        damaged(lambda fields: fields.update(measured_at="yesterday")),
        damaged(lambda fields: fields.update(measured_on={})),
    ],
    ids=["empty", "cut short", "no text", "another file", "no prefill", "not a number", "negative", "batches missing",
         "no rate", "no date", "of something else"],
)  # fmt: skip
def test_a_damaged_or_foreign_file_is_ignored_and_written_anew(damage: Callable[[bytes], bytes], home: Path) -> None:
    remember_speed(HERE, SPEED, NOW)
    (file,) = (home / "throughput").iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert remembered_speed(HERE, NOW) is None
    remember_speed(HERE, SPEED, NOW)
    assert remembered_speed(HERE, NOW) == SPEED


def test_a_full_disk_is_no_reason_not_to_serve(full_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWARM_HOME", str(full_disk))
    remember_speed(HERE, SPEED, NOW)
    assert remembered_speed(HERE, NOW) is None


# words


def announcement(**fields: object) -> Announcement:
    known = {
        "peer_id": "me", "model": "ab" * 32, "state": State.ONLINE, "num_blocks": 9, "start": 0, "end": 9,
        "dtype": "float32", "throughput": 28.4, "free_kv_tokens": 7, "version": "0", "issued_at": 0.0,
    }  # fmt: skip
    return Announcement.model_validate({**known, **fields})


def test_a_donor_reads_what_the_machine_does() -> None:
    figures = {"decode_steps_per_s": {1: 28.4, 4: 52.2, 16: 91.4}, "prefill_tokens_per_s": 588.0}
    assert compute_sentence(announcement(**figures)) == (
        "Its blocks let through 28 tokens/s for one user, 52 for 4 users at once, 91 for 16 users at once; "
        "it reads prompts at 588 tokens/s."
    )
    assert network_sentence(NetworkSpeed({"a": 0.0214, "b": 0.3}, 1.25e6, 12.5e6)) == (
        "Network, measured to 2 other servers: the nearest is 21 ms away and back, sends 10.0 Mbit/s, "
        "receives 100 Mbit/s."
    )
    assert network_sentence(NetworkSpeed({"a": 0.0004})) == (
        "Network, measured to 1 other server: the nearest is 0.4 ms away and back."
    )
    assert network_sentence(NetworkSpeed()) == ""
    assert (milliseconds(0.0123), megabits(3e5)) == ("12 ms", "2.4 Mbit/s")


# real servers


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("tiny")
    save_tiny_model("llama", directory)
    return str(directory)


async def announced(
    swarm: LocalSwarm, model: str, condition: Callable[[list[Announcement]], bool]
) -> dict[str, Announcement]:
    """The announcements of a model's servers, as soon as they fulfil `condition`."""
    network = await Network.join(ClientSettings(initial_peers=tuple(swarm.initial_peers)))
    try:
        async with asyncio.timeout(60):
            while not condition(found := await network.servers(open_checkpoint(model).model_digest)):  # noqa: ASYNC110
                await asyncio.sleep(0.5)
        return {one.peer_id: one for one in found}
    finally:
        await network.leave()


async def test_servers_announce_how_fast_they_and_the_ways_to_each_other_are(
    warm: WarmLoopback, swarm: LocalSwarm, tiny: str
) -> None:
    peers = await asyncio.to_thread(swarm.start_servers, tiny, ["0:2", "2:4", "2:4"])
    ids = {peer.peer_id for peer in peers}
    found = await announced(swarm, tiny, lambda servers: all(len(one.rtts_s) == 2 for one in servers))
    assert set(found) == ids
    for peer_id, server in found.items():
        assert server.decode_steps_per_s[1] == server.throughput
        assert list(server.decode_steps_per_s) == list(BATCHES) and min(server.decode_steps_per_s.values()) > 1
        assert server.prefill_tokens_per_s is not None and server.prefill_tokens_per_s > 1
        assert set(server.rtts_s) == ids - {peer_id}
        assert all(0 < rtt < 0.05 for rtt in server.rtts_s.values())
        assert server.upload_bytes_per_s is not None and server.upload_bytes_per_s > 1e5
        assert server.download_bytes_per_s is not None and server.download_bytes_per_s > 1e5
    arguments = ["status", tiny, "--json", "--initial-peers", *swarm.initial_peers]
    status = await asyncio.to_thread(warm.run, "swarm.commands.main", *arguments, COLUMNS="160")
    shown = json.loads(status.stdout.splitlines()[-1])["servers"]
    assert {one["peer_id"]: one["rtts_s"] for one in shown} == {one.peer_id: one.rtts_s for one in found.values()}
    assert "As each server measured itself" in status.stderr
    assert status.stderr.count("Mbit/s") == 6


async def test_a_server_that_is_alone_announces_no_network(swarm: LocalSwarm, tmp_path: Path) -> None:
    save_tiny_model("qwen2", tmp_path)
    peer = await asyncio.to_thread(swarm.start_server, str(tmp_path))
    started = time.time()
    found = await announced(swarm, str(tmp_path), lambda servers: servers[0].issued_at > started + 8)
    server = found[peer.peer_id]
    assert (server.rtts_s, server.upload_bytes_per_s, server.download_bytes_per_s) == ({}, None, None)
    assert server.decode_steps_per_s


def test_a_server_remembers_its_speed_over_restarts_until_told_not_to(swarm: LocalSwarm, tmp_path: Path) -> None:
    save_tiny_model("qwen3", tmp_path)

    def speeds(*arguments: str) -> tuple[object, object]:
        peer = swarm.start_server(str(tmp_path), "--blocks", "0:3", *arguments)
        peer.signal(signal.SIGTERM)
        peer.process.wait(20)
        assert peer.ready is not None
        return peer.ready["decode_steps_per_s"], peer.ready["prefill_tokens_per_s"]

    first = speeds()
    assert speeds() == first
    assert speeds("--measure-again") != first
