"""A server that answers pings and does nothing else: nobody waits for it for ever."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from swarm.client import session as client_session
from swarm.commands.local_swarm import LocalSwarm
from swarm.errors import NoRoute
from swarm.models import open_checkpoint
from swarm.models.local import load_whole_model

_IDS = torch.tensor([[5, 9, 33, 71]])
_GREEDY: Any = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}


def test_a_server_that_does_not_get_on_is_left(
    swarm: LocalSwarm, tiny: str, connect: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_session, "_STUCK_S", 3.0)
    monkeypatch.setattr(client_session, "_SEND_AGAIN_S", 1.0)
    stuck = swarm.start_server(tiny, "--blocks", "0:4", "--threads", "1", program="tests.stuck_server")
    alone = connect(tiny, allowed_servers=[stuck.peer_id])
    with pytest.raises(NoRoute, match=f"do not get on: nothing came of a step .*{stuck.peer_id}"):
        alone.generate(_IDS, **_GREEDY)

    model = connect(tiny)
    session = model.inference_session(max_length=16)
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(model.generate, _IDS, session=session, **_GREEDY)
        swarm.start_server(tiny, "--blocks", "0:4", "--threads", "1")
        assert torch.equal(answer.result(), load_whole_model(open_checkpoint(tiny)).generate(_IDS, **_GREEDY))
    assert [leg.peer_id for leg in session.route] != [stuck.peer_id]
