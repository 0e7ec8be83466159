"""Servers find their places by themselves, and new ones when others die or join; clients notice a re-route at most.

``SWARM_STEADY_S=300 pytest tests/test_rebalancing.py`` watches for five minutes that nobody moves without need.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from live_swarm import Talker, moves, redundancy, seen_until, until
from safetensors import safe_open
from tiny_models import TINY_MODELS
from transformers import AutoConfig, AutoModelForCausalLM

from swarm.client import ClientSettings, Network
from swarm.commands.local_swarm import LocalPeer, LocalSwarm
from swarm.dht import Announcement, State
from swarm.models import open_checkpoint
from swarm.models.local import load_whole_model

BLOCKS, BLOCKS_EACH = 12, 4
STEADY_S = float(os.environ.get("SWARM_STEADY_S", "30"))
"""For so long nobody may move once everybody is in place."""
AUTO = [
    "--num-blocks", str(BLOCKS_EACH), "--threads", "1", "--kv-tokens", "8192", "--drain-timeout", "5",
    "--rebalance-every", "2", "--claim-wait", "1", "--settle-wait", "2", "--move-cost", "5", "--move-horizon", "120",
]  # fmt: skip
AT_ONCE = [
    "--num-blocks", "2", "--threads", "1", "--rebalance-every", "1", "--claim-wait", "0.5", "--settle-wait", "0",
]  # fmt: skip


def save_deep_model(directory: Path, blocks: int, seed: int) -> str:
    family, fields = TINY_MODELS["llama"]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = AutoConfig.for_model(
            family, **{**fields, "num_hidden_layers": blocks, "max_position_embeddings": 4096}
        )
        AutoModelForCausalLM.from_config(config).float().save_pretrained(directory)
    return str(directory)


@pytest.fixture
async def network(swarm: LocalSwarm) -> AsyncIterator[Network]:
    joined = await Network.join(ClientSettings(initial_peers=tuple(swarm.initial_peers)))
    yield joined
    await joined.leave()


async def test_a_swarm_balances_itself_and_a_client_notices_nothing(
    swarm: LocalSwarm,
    connect: Callable[..., Any],
    network: Network,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    model = save_deep_model(tmp_path, BLOCKS, seed=1)

    # Six join an empty swarm at once, and cover it evenly.
    peers = [swarm.start_server(model, *AUTO, wait=False) for _ in range(6)]
    for peer in peers:
        await asyncio.to_thread(peer.wait_until_ready)
    servers = await seen_until(network, model, lambda servers: redundancy(servers, BLOCKS) == [2] * BLOCKS)
    record_property("moves_after_join", moves(servers))

    # Three are killed, among them all who host the first block: coverage returns, and tokens go on.
    talker = Talker(await asyncio.to_thread(connect, model))
    await asyncio.to_thread(until, lambda: talker.ids.shape[1] > 10 or talker.error is not None)
    first = [one.peer_id for one in servers if one.hosts(0)]
    others = [one.peer_id for one in servers if one.peer_id not in first]
    killed = time.monotonic()
    for peer_id in [*first, *others][:3]:
        swarm.server(peer_id).kill()
    before = talker.ids.shape[1]
    servers = await seen_until(
        network, model, lambda servers: len(servers) == 3 and redundancy(servers, BLOCKS) == [1] * BLOCKS
    )
    record_property("coverage_returned_s", time.monotonic() - killed)
    await asyncio.to_thread(until, lambda: talker.ids.shape[1] > before + 10 or talker.error is not None)

    # Two more come to the first blocks: who was alone there goes where it is needed more.
    fixed = [swarm.start_server(model, "--blocks", "0:4", "--threads", "1", wait=False) for _ in range(2)]
    for peer in fixed:
        await asyncio.to_thread(peer.wait_until_ready)
    servers = await seen_until(
        network, model, lambda servers: len(servers) == 5 and sorted(redundancy(servers, BLOCKS)) == [1] * 4 + [2] * 8
    )

    # From now on nobody moves.
    settled, watched_until = moves(servers), time.monotonic() + STEADY_S
    while time.monotonic() < watched_until:
        await asyncio.sleep(1)
        servers = await seen_until(network, model, lambda servers: len(servers) == 5, within_s=10)
        assert moves(servers) == settled
        assert all(one.state is State.ONLINE for one in servers)

    ids = await asyncio.to_thread(talker.answer)
    whole = load_whole_model(open_checkpoint(model))
    count = ids.shape[1] - 4
    record_property("tokens", count)
    expected = whole.generate(ids[:, :4], do_sample=False, max_new_tokens=count, min_new_tokens=count)
    assert ids.tolist() == expected.tolist()


async def test_who_has_more_in_memory_hosts_what_is_slowest_and_its_sessions_stay(
    swarm: LocalSwarm, connect: Callable[..., Any], network: Network, tmp_path: Path
) -> None:
    model = save_deep_model(tmp_path, BLOCKS, seed=4)
    for _ in range(2):
        await asyncio.to_thread(swarm.start_server, model, "--blocks", f"0:{BLOCKS}", "--threads", "1")
    one = await asyncio.to_thread(
        swarm.start_server, model, "--threads", "1", "--rebalance-every", "1", "--claim-wait", "0.5"
    )
    assert one.ready is not None and (one.ready["start"], one.ready["end"]) == (0, BLOCKS)
    session = connect(model, pinned_servers=[one.peer_id]).inference_session(max_length=16)
    hidden_states = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(1))
    outputs = [await asyncio.to_thread(session.step, hidden_states[:, :8])]

    # Somebody comes to the first half: the other one is slowest now.
    await asyncio.to_thread(swarm.start_server, model, "--blocks", f"0:{BLOCKS // 2}", "--threads", "1")

    def has_changed(servers: Sequence[Announcement]) -> bool:
        return any((server.peer_id, server.start) == (one.peer_id, BLOCKS // 2) for server in servers)

    servers = await seen_until(network, model, has_changed)
    said = next(server for server in servers if server.peer_id == one.peer_id)
    assert (said.start, said.end, said.loaded, said.moves) == (BLOCKS // 2, BLOCKS, (0, BLOCKS), 0)
    assert said.state is State.ONLINE and len(said.block_digests) == BLOCKS // 2
    assert said.throughput == pytest.approx(2 * one.ready["throughput"])
    for _ in range(8):
        position = sum(output.shape[1] for output in outputs)
        outputs.append(await asyncio.to_thread(session.step, hidden_states[:, position : position + 1]))
    assert [leg.peer_id for leg in session.route] == [one.peer_id] and not session.recoveries
    whole = load_whole_model(open_checkpoint(model))
    expected = whole.model(inputs_embeds=hidden_states).last_hidden_state
    assert torch.allclose(whole.model.norm(torch.cat(outputs, dim=1)), expected, atol=1e-5)
    session.close()


async def make_it_want_to_move(swarm: LocalSwarm, model: str, mover: LocalPeer) -> None:
    """Somebody else takes the blocks of `mover`, so that it is needed at the others, which have no server."""
    assert mover.ready is not None and (mover.ready["start"], mover.ready["end"]) == (0, 2)
    await asyncio.to_thread(swarm.start_server, model, "--blocks", "0:2", "--threads", "1")


async def test_sigterm_during_a_move_ends_the_server_in_time(
    swarm: LocalSwarm, network: Network, tmp_path: Path
) -> None:
    model = save_deep_model(tmp_path, 4, seed=2)
    mover = await asyncio.to_thread(swarm.start_server, model, *AT_ONCE)
    await make_it_want_to_move(swarm, model, mover)

    def is_moving(servers: Sequence[Announcement]) -> bool:
        return any(one.peer_id == mover.peer_id and one.state is not State.ONLINE for one in servers)

    await seen_until(network, model, is_moving)
    mover.signal(signal.SIGTERM)
    assert await asyncio.to_thread(mover.process.wait, 30) == 0
    await seen_until(network, model, lambda servers: all(one.peer_id != mover.peer_id for one in servers), 5)


async def test_a_server_that_cannot_load_its_new_blocks_goes_back_to_the_old(
    swarm: LocalSwarm, network: Network, tmp_path: Path
) -> None:
    model = save_deep_model(tmp_path, 4, seed=3)
    mover = await asyncio.to_thread(swarm.start_server, model, *AT_ONCE)
    damage_last_block(tmp_path / "model.safetensors")
    await make_it_want_to_move(swarm, model, mover)
    await asyncio.to_thread(until, lambda: "going back to blocks 0 to 1" in mover.log.read_text())
    servers = await seen_until(
        network, model, lambda servers: [one.state for one in servers] == [State.ONLINE] * 2, within_s=30
    )
    assert {(one.start, one.end, one.moves) for one in servers} == {(0, 2, 0)}
    assert "checksum of block" in mover.log.read_text()
    assert mover.process.poll() is None


def damage_last_block(file: Path) -> None:
    """Change bytes of block 3 so that neither size nor time of the file tells."""
    with safe_open(file, "pt") as tensors:
        needle = tensors.get_tensor("model.layers.3.mlp.down_proj.weight").numpy().tobytes()[:64]
    times, content = file.stat(), file.read_bytes()
    assert content.count(needle) == 1
    with file.open("r+b") as opened:
        opened.seek(content.index(needle))
        opened.write(bytes(64))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
