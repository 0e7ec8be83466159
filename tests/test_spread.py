"""Load over real servers: many clients at once spread over those that are as good as one another.

The live part is for a machine that does nothing else: ``SWARM_SPREAD=1 pytest tests/test_spread.py``.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from swarm.client.background import BackgroundLoop
from swarm.commands.local_swarm import LocalPeer, LocalSwarm
from swarm.routing import PROFILES, ClientLinks, HostedSpan, find_route

SERVERS = 8
USERS = 32
PROGRAMS = 4
"""Clients with a network of their own; each serves so many of the users."""


@pytest.fixture(scope="module")
def servers(swarm: LocalSwarm, tiny: str) -> list[LocalPeer]:
    """Eight of the whole model. What the first measures of its speed, the others remember: they are equally fast."""
    first = swarm.start_server(tiny, "--blocks", "0:4", "--threads", "1")
    return [first, *swarm.start_servers(tiny, ["0:4"] * (SERVERS - 1), "--threads", "1")]


@pytest.mark.skipif("SWARM_SPREAD" not in os.environ, reason="needs a machine that does nothing else: SWARM_SPREAD=1")
def test_thirty_two_users_at_once_load_eight_servers_in_proportion_to_what_they_bear(
    servers: list[LocalPeer], tiny: str, connect: Callable[..., Any]
) -> None:
    """On one machine, which that keeps so busy that pings take anything from 5 to 50 ms."""
    models = [connect(tiny) for _ in range(PROGRAMS)]
    sessions = [models[index % PROGRAMS].inference_session(max_length=32) for index in range(USERS)]
    with ThreadPoolExecutor(USERS) as pool:
        list(pool.map(lambda session: session.step(torch.zeros(1, 1, 64)), sessions))
    load = Counter(leg.peer_id for session in sessions for leg in session.route)
    announced = BackgroundLoop.shared().run(models[0]._network.servers(models[0]._checkpoint.model_digest))
    bears = {server.peer_id: max(server.decode_steps_per_s.values()) for server in announced}
    assert bears.keys() == {server.peer_id for server in servers}
    for peer_id, most in bears.items():
        assert load[peer_id] == pytest.approx(USERS * most / sum(bears.values()), rel=0.25), (load, bears)
    for session in sessions:
        session.close()


def test_what_measurements_cannot_tell_apart_is_as_good_and_what_they_can_is_not() -> None:
    spans = [HostedSpan(name, 0, 4, 1000.0) for name in ("here", "beside", "far")]
    rtts_s = {"here": 0.010, "beside": 0.030, "far": 0.090}

    def chosen(doubt_s: float) -> set[str]:
        links = ClientLinks(rtts_s, doubts_s=dict.fromkeys(rtts_s, doubt_s))
        routes = [
            find_route(spans, 0, 4, links=links, profile=PROFILES["interactive"], tolerance=0.05, salt=str(salt))
            for salt in range(50)
        ]
        return {route[0].peer_id for route in routes if route is not None}

    assert chosen(0.0) == {"here"}
    assert chosen(0.015) == {"here", "beside"}
