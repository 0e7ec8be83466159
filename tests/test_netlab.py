"""The laboratory keeps its word: delays, bandwidths, losses and cuts are as asked for, and nothing is left behind."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest
import torch
from conftest import obey_ctrl_c
from tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM

from swarm.client import AutoDistributedModelForCausalLM
from swarm.client.background import BackgroundLoop
from swarm.commands.local_swarm import LocalSwarm
from tests.netlab import Laboratory, Link, netlab_available
from tests.netlab.accuracy import one_way_delays_s, tcp_throughput_bps
from tests.netlab.links import Wire

_REPOSITORY = Path(__file__).parents[1]
_REASON = netlab_available()
needs_netlab = pytest.mark.skipif(_REASON is not None, reason=_REASON or "")

_GRANDPARENT = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", "print('up', flush=True); import time; time.sleep(600)"])
import time; time.sleep(600)
"""
_FORGOTTEN_LABORATORY = """
from tests.netlab import Laboratory
lab = Laboratory(["a", "b"])
lab.host("a").start(["sleep", "600"])
print(lab.host("a").namespace, lab.relay_pid, flush=True)
import time; time.sleep(600)
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[Laboratory]:
    with Laboratory(["a", "b", "c"]) as laboratory:
        yield laboratory


@pytest.fixture(autouse=True)
def good_links(request: pytest.FixtureRequest) -> None:
    """Every test begins with links that are up and as fast as can be."""
    if "lab" in request.fixturenames:
        laboratory: Laboratory = request.getfixturevalue("lab")
        for pair in [("a", "b"), ("a", "c"), ("b", "c")]:
            laboratory.set_link(*pair, Link())
            laboratory.heal(*pair)


class Datagrams:
    """UDP between two hosts of a laboratory."""

    def __init__(self, lab: Laboratory, source: str, target: str) -> None:
        with lab.inside(source):
            self.sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with lab.inside(target):
            self.receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.receiver.bind((lab.host(target).address, 0))
        self.receiver.settimeout(5)

    def send(self, number: int = 0) -> None:
        self.sender.sendto(number.to_bytes(4, "big"), self.receiver.getsockname())

    def receive(self, timeout_s: float = 5.0) -> int:
        self.receiver.settimeout(timeout_s)
        return int.from_bytes(self.receiver.recv(4), "big")

    def pass_through(self) -> bool:
        """Does a datagram arrive within 0.2 s?"""
        self.send()
        with contextlib.suppress(TimeoutError):
            return self.receive(0.2) == 0
        return False


def connection(lab: Laboratory, source: str, target: str) -> tuple[socket.socket, socket.socket]:
    """The two ends of a TCP connection."""
    with lab.inside(target):
        listener = socket.create_server((lab.host(target).address, 0))
    with listener, lab.inside(source):
        near = socket.create_connection(listener.getsockname(), 5)
        far, _ = listener.accept()
    return near, far


def namespaces_of(pid: int) -> set[str]:
    return {path.name for path in Path("/run/netns").glob(f"swarm-lab-{pid}-*")}


def eventually(is_true: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    """Wait until it is; False if it never was."""
    deadline = time.monotonic() + timeout_s
    while not is_true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@needs_netlab
@pytest.mark.quiet
def test_a_round_trip_takes_twice_the_delay(lab: Laboratory) -> None:
    lab.set_link("a", "b", Link(delay_s=0.025))
    near, far = connection(lab, "a", "b")
    for end in (near, far):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    threading.Thread(target=lambda: [far.send(far.recv(1)) for _ in range(20)], daemon=True).start()
    trips_s = []
    for _ in range(20):
        start_s = time.monotonic()
        near.send(b"x")
        near.recv(1)
        trips_s.append(time.monotonic() - start_s)
    assert min(trips_s) > 0.0495
    assert statistics.median(trips_s) == pytest.approx(0.050, abs=0.003)


@needs_netlab
def test_short_delays_are_accurate(lab: Laboratory) -> None:
    lab.set_link("a", "b", Link(delay_s=0.0025))
    # 0.1 ms on a quiet machine; a busy one only makes it later.
    assert 0.0023 < statistics.median(one_way_delays_s(lab, 100)) < 0.0035


@needs_netlab
def test_jitter_spreads_delays_and_keeps_the_order(lab: Laboratory) -> None:
    lab.set_link("a", "b", Link(delay_s=0.010, jitter_s=0.005))
    delays_s = one_way_delays_s(lab, 60)
    assert 0.0045 < min(delays_s) < 0.008
    assert 0.012 < statistics.quantiles(delays_s, n=20)[-1] < 0.017
    datagrams = Datagrams(lab, "a", "b")
    for number in range(50):
        datagrams.send(number)
    assert [datagrams.receive() for _ in range(50)] == list(range(50))


@needs_netlab
def test_bandwidth_is_what_was_asked_for(lab: Laboratory) -> None:
    lab.set_link("a", "b", Link(delay_s=0.005, bandwidth_bps=20e6))
    assert tcp_throughput_bps(lab, "a", "b", 1.5) == pytest.approx(20e6, rel=0.15)


@needs_netlab
def test_loss_takes_its_share_and_the_same_packets_for_the_same_seed() -> None:
    arrived = []
    for _ in range(2):
        with Laboratory(["a", "b"], Link(loss=0.2), seed=7) as lab:
            datagrams = Datagrams(lab, "a", "b")
            numbers = []
            for number in range(2000):
                datagrams.send(number)
                if number % 100 == 99:  # let none get lost in a full socket buffer
                    with contextlib.suppress(TimeoutError):
                        while True:
                            numbers.append(datagrams.receive(0.02))
        arrived.append(numbers)
    # Binomial: 400 of 2000 are expected, with a deviation of 18; five deviations are allowed.
    assert 2000 - len(arrived[0]) == pytest.approx(400, abs=90)
    assert arrived[0] == arrived[1]


@needs_netlab
def test_tcp_delivers_every_byte_over_a_link_that_loses_single_packets_of_bursts(lab: Laboratory) -> None:
    lab.set_link("a", "b", Link(delay_s=0.002, loss=0.02))
    near, far = connection(lab, "a", "b")
    sent = Random(1).randbytes(3_000_000)

    def send() -> None:
        near.sendall(sent)
        near.close()

    threading.Thread(target=send, daemon=True).start()
    digest = hashlib.sha256()
    far.settimeout(10)
    while data := far.recv(1 << 16):
        digest.update(data)
    assert digest.digest() == hashlib.sha256(sent).digest()


@needs_netlab
def test_a_cut_is_silent_and_heals(lab: Laboratory) -> None:
    near, far = connection(lab, "a", "b")
    lab.cut("a", "b")
    near.send(b"held up")
    far.settimeout(0.4)
    with pytest.raises(TimeoutError):  # no reset, no end of file
        far.recv(100)
    assert Datagrams(lab, "a", "c").pass_through()
    lab.heal("a", "b")
    far.settimeout(5)
    assert far.recv(100) == b"held up"


@needs_netlab
def test_a_cut_takes_what_is_under_way(lab: Laboratory) -> None:
    lab.set_link("a", "b", Link(delay_s=0.1))
    datagrams = Datagrams(lab, "a", "b")
    datagrams.send(1)
    time.sleep(0.02)
    lab.cut("a", "b")
    lab.heal("a", "b")
    datagrams.send(2)
    assert datagrams.receive() == 2


@needs_netlab
def test_one_direction_can_differ_from_the_other(lab: Laboratory) -> None:
    lab.set_link("b", "a", Link(delay_s=0.02), one_way=True)
    there, back = Datagrams(lab, "a", "b"), Datagrams(lab, "b", "a")
    start_s = time.monotonic()
    there.send()
    there.receive()
    middle_s = time.monotonic()
    back.send()
    back.receive()
    assert middle_s - start_s < 0.015 < 0.0195 < time.monotonic() - middle_s
    lab.cut("a", "b", one_way=True)
    assert not there.pass_through()
    assert back.pass_through()


@needs_netlab
def test_a_host_that_is_cut_off_rejoins_without_healing_other_cuts(lab: Laboratory) -> None:
    pairs = {pair: Datagrams(lab, *pair) for pair in ("ab", "ca", "bc")}
    lab.cut("b", "c")
    lab.cut_off("a")
    assert not any(datagrams.pass_through() for datagrams in pairs.values())
    lab.rejoin("a")
    assert [pair for pair, datagrams in pairs.items() if datagrams.pass_through()] == ["ab", "ca"]


@needs_netlab
def test_freeze_thaw_and_kill_reach_descendants(lab: Laboratory) -> None:
    process = lab.host("a").start([sys.executable, "-c", _GRANDPARENT], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children()]
        assert len(tree) == 2
        lab.freeze(process)
        assert eventually(lambda: all(member.status() == psutil.STATUS_STOPPED for member in tree))
        lab.thaw(process)
        assert eventually(lambda: all(member.status() == psutil.STATUS_SLEEPING for member in tree))
        lab.kill(process)
        assert process.returncode == -signal.SIGKILL
        assert eventually(lambda: not any(is_alive(member.pid) for member in tree))


@needs_netlab
def test_nothing_is_left_after_an_exception() -> None:
    before = namespaces_of(os.getpid())
    with pytest.raises(ZeroDivisionError), Laboratory(["a", "b"]) as lab:
        relay, child = lab.relay_pid, lab.host("a").start(["sleep", "600"])
        assert len(namespaces_of(os.getpid()) - before) == 2
        raise ZeroDivisionError
    assert namespaces_of(os.getpid()) == before
    assert not is_alive(relay)
    assert child.wait(5) == -signal.SIGKILL


@needs_netlab
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_of_a_laboratory_whose_process_dies(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _FORGOTTEN_LABORATORY],
        cwd=_REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=obey_ctrl_c,
    ) as owner:
        assert owner.stdout is not None
        namespace, relay = owner.stdout.readline().split()
        assert namespace in namespaces_of(owner.pid)
        owner.send_signal(number)
        owner.wait()
        assert eventually(lambda: not namespaces_of(owner.pid))
        assert eventually(lambda: not is_alive(int(relay)))


@needs_netlab
def test_a_new_laboratory_sweeps_up_after_dead_ones() -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    leftover = f"swarm-lab-{dead.pid}-0-a"
    subprocess.run(["ip", "netns", "add", leftover], check=True)
    with Laboratory(["a", "b"]):
        assert not namespaces_of(dead.pid)


@needs_netlab
def test_the_relay_sleeps_when_no_packet_is_under_way(lab: Laboratory) -> None:
    relay = psutil.Process(lab.relay_pid)
    before = relay.cpu_times()
    time.sleep(1)
    after = relay.cpu_times()
    assert after.user + after.system - before.user - before.system <= 0.05


@needs_netlab
def test_a_swarm_of_distant_hosts_answers_as_the_local_model(
    swarm_home: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model("llama", tmp_path)
    local = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.tensor([[5, 17, 9, 40]])
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0}
    with (
        Laboratory(["client", "server", "bootstrap"], Link(delay_s=0.010)) as lab,
        LocalSwarm(lab.host("bootstrap")) as swarm,
    ):
        server = swarm.start_server(str(tmp_path), "--threads", "1", host=lab.host("server"))
        assert [address.split("/")[2:4] for address in server.addresses] == [[lab.host("server").address, "tcp"]]
        status = lab.host("client").start(
            [sys.executable, "-m", "swarm.commands.main", "status", str(tmp_path), "--json"]
            + ["--initial-peers", *swarm.initial_peers],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        with status:
            assert server.peer_id in status.communicate(timeout=60)[0]
        assert status.returncode == 0
        monkeypatch.setattr(BackgroundLoop, "_shared", BackgroundLoop._shared)  # for the tests that follow
        BackgroundLoop.start_anew()  # the clients of other tests live on the outside
        with lab.inside("client"):
            model = AutoDistributedModelForCausalLM.from_pretrained(str(tmp_path), initial_peers=swarm.initial_peers)
        start_s = time.monotonic()
        assert model.generate(ids, **options).tolist() == local.generate(ids, **options).tolist()
        assert time.monotonic() - start_s > 6 * 0.020
        model.disconnect()


def test_a_wire_drops_what_its_queue_cannot_hold() -> None:
    wire = Wire(Link(delay_s=1.0, bandwidth_bps=8000, queue_s=0.5), Random(0))  # 1000 bytes per second
    arrivals = [wire.arrival_s(250, 10.0) for _ in range(5)]
    assert arrivals == [pytest.approx(11.25), pytest.approx(11.5), pytest.approx(11.75), None, None]
    assert wire.arrival_s(250, 10.3) == pytest.approx(12.0)


@pytest.mark.parametrize("fields", [{"loss": 1.5}, {"delay_s": -1}, {"bandwidth_bps": 0}])
def test_impossible_links_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        Link(**fields)


def is_alive(pid: int) -> bool:
    """A zombie is not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False
