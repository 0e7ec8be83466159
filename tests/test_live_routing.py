"""Routing over real servers: pinned servers are used, regions are kept and left."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tiny_models import tiny_model

from swarm.client import AutoDistributedModelForCausalLM
from swarm.client.background import BackgroundLoop
from swarm.commands.local_swarm import LocalPeer, LocalSwarm
from swarm.errors import NoRoute
from tests.netlab import Laboratory, Link, netlab_available

NEAR, FAR = Link(delay_s=0.001), Link(delay_s=0.040)
REGIONS = {"here": ["client", "here1", "here2"], "there": ["bootstrap", "there1", "there2"]}


@pytest.fixture(scope="module")
def whole() -> Any:
    """The tiny model, here."""
    return tiny_model("llama").eval()


@pytest.fixture(scope="module")
def servers(swarm: LocalSwarm, tiny: str) -> list[LocalPeer]:
    """Two of the whole model."""
    return swarm.start_servers(tiny, ["0:4"] * 2, "--threads", "1")


def test_a_pinned_server_is_used_and_one_that_cannot_be_is_an_error(
    servers: list[LocalPeer], tiny: str, connect: Callable[..., Any]
) -> None:
    for server in servers:
        with connect(tiny, pinned_servers=[server.peer_id]).inference_session(max_length=8) as session:
            session.step(torch.zeros(1, 1, 64))
            assert [leg.peer_id for leg in session.route] == [server.peer_id]
    nobody = connect(tiny, pinned_servers=["12D3KooWNobody"], deadline_s=0.5)
    with pytest.raises(NoRoute, match="The pinned server 12D3KooWNobody does not announce this model"):
        nobody.inference_session(max_length=8).step(torch.zeros(1, 1, 64))
    with pytest.raises(ValueError, match="both pinned and blocked"):
        connect(tiny, pinned_servers=["a"], blocked_servers=["a"])


class Watcher:
    """A streamer that counts tokens, slowly, and tells when there are some."""

    def __init__(self) -> None:
        self.some = threading.Event()
        self._count = 0

    def put(self, value: object) -> None:
        self._count += 1
        if self._count > 8:
            self.some.set()
        time.sleep(0.02)

    def end(self) -> None:
        pass


@pytest.fixture
def regions() -> Iterator[Laboratory]:
    """Two regions: the client and two servers, the bootstrap peer and two servers; 80 ms of a round trip between."""
    if (reason := netlab_available()) is not None:
        pytest.skip(reason)
    with Laboratory([host for hosts in REGIONS.values() for host in hosts], FAR) as lab:
        for hosts in REGIONS.values():
            for index, one in enumerate(hosts):
                for other in hosts[index + 1 :]:
                    lab.set_link(one, other, NEAR)
        yield lab


def test_routes_stay_in_a_region_and_leave_it_when_it_is_cut_off(
    regions: Laboratory, tiny: str, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.tensor([[5, 17, 9, 40]])
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 40, "min_new_tokens": 40, "pad_token_id": 0}
    with LocalSwarm(regions.host("bootstrap")) as swarm:
        peers = {
            host: swarm.start_server(tiny, "--blocks", blocks, "--threads", "1", host=regions.host(host), wait=False)
            for region in REGIONS
            for host, blocks in [(f"{region}1", "0:2"), (f"{region}2", "2:4")]
        }
        for peer in peers.values():
            peer.wait_until_ready()
        monkeypatch.setattr(BackgroundLoop, "_shared", BackgroundLoop._shared)  # for the tests that follow
        BackgroundLoop.start_anew()  # the clients of other tests live on the outside
        with regions.inside("client"):
            model = AutoDistributedModelForCausalLM.from_pretrained(tiny, initial_peers=swarm.initial_peers)
        here = [peers["here1"].peer_id, peers["here2"].peer_id]
        there = [peers["there1"].peer_id, peers["there2"].peer_id]
        for _ in range(4):
            with model.inference_session(max_length=8) as session:
                session.step(torch.zeros(1, 1, 64))
                assert [leg.peer_id for leg in session.route] == here
        watcher = Watcher()
        with model.inference_session(max_length=48) as session, ThreadPoolExecutor(1) as pool:
            answer = pool.submit(model.generate, ids, session=session, streamer=watcher, **options)
            assert watcher.some.wait(30)
            assert [leg.peer_id for leg in session.route] == here
            for host in ("here1", "here2"):
                regions.cut_off(host)
            assert answer.result(60).tolist() == whole.generate(ids, **options).tolist()
            assert [leg.peer_id for leg in session.route] == there
            assert session.recoveries
        model.disconnect()
