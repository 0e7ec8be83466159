"""Experts on servers of their own, over real processes: the tokens are the local model's, also when one server dies."""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from test_faults import stranger
from tiny_models import save_tiny_model, tiny_model
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM
from warm_start import WarmLoopback

from swarm.client import AutoDistributedModelForCausalLM, ClientSettings, Network
from swarm.commands.local_swarm import LocalPeer, LocalSwarm
from swarm.errors import ExpertsMissing, SwarmError
from swarm.models import open_checkpoint
from swarm.placement.expert_demand import ExpertDemand
from swarm.protocol.frames import encode_frame
from swarm.protocol.messages import (
    EXPERTS_PROTOCOL,
    ComputeExperts,
    ExpertOutputs,
    ExpertsOpened,
    Message,
    OpenExperts,
    Ping,
    Refusal,
)
from swarm.server.experts.preparation import prepare_experts
from swarm.server.experts.wanted import WantedExperts
from swarm.server.plan import PROCESS_BYTES, WORKING_BYTES
from swarm.server.preparation import prepare
from swarm.server.settings import ServerSettings
from swarm.transport.node import Node
from swarm.transport.watched_stream import WatchedStream

SEEN_ALWAYS = ["mixtral", "deepseek_v3", "qwen2_moe", "gpt_oss"]
SEEN_IN_SOAK = ["qwen3_moe", "olmoe", "glm4_moe", "granitemoe", "phimoe", "ernie4_5_moe"]
PROMPT = torch.tensor([[5, 17, 9, 40, 3, 22, 8], [1, 1, 11, 60, 2, 7, 33]])
MASK = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
ONE = PROMPT[:1]
MIB = 1024**2


@contextmanager
def expert_swarm(host: WarmLoopback, model: str, *choices: str, layers: str = "none") -> Iterator[LocalSwarm]:
    """One server of all blocks, which keeps the experts `layers`, and one server for each of the other choices."""
    with LocalSwarm(host) as swarm:
        blocks = ("--blocks", "0:4", "--experts", layers, "--experts-deadline", "3", "--threads", "1")
        swarm.start_server(model, *blocks, wait=False)
        for choice in choices:
            swarm.start_server(model, "--experts", choice, "--threads", "1", wait=False)
        for server in swarm.servers:
            server.wait_until_ready()
        yield swarm


def connected(swarm: LocalSwarm, model: str, **options: Any) -> Any:
    return AutoDistributedModelForCausalLM.from_pretrained(model, initial_peers=swarm.initial_peers, **options)


def answer(model: Any, tokens: int = 24, **options: Any) -> list[int]:
    ids = model.generate(ONE, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, **options)
    return ids[0].tolist()


@pytest.mark.parametrize("family", [*SEEN_ALWAYS, *(pytest.param(one, marks=pytest.mark.soak) for one in SEEN_IN_SOAK)])
def test_a_server_of_blocks_without_experts_and_three_of_experts_answer_as_the_local_model(
    family: str, warm: WarmLoopback, tmp_path: Path
) -> None:
    save_tiny_model(family, tmp_path)
    local = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    last = "2-3" if local.config.num_hidden_layers and family not in ("deepseek_v3", "glm4_moe") else "2-7"
    with expert_swarm(warm, str(tmp_path), "*:0", "*:1", f"*:{last}") as swarm:
        model = connected(swarm, str(tmp_path))
        options = {"do_sample": False, "max_new_tokens": 16, "min_new_tokens": 16, "pad_token_id": 0}
        expected = local.generate(PROMPT, attention_mask=MASK, **options)
        assert model.generate(PROMPT, attention_mask=MASK, **options).tolist() == expected.tolist()
        with torch.no_grad():
            torch.testing.assert_close(
                model(PROMPT, use_cache=False).logits, local(PROMPT, use_cache=False).logits, atol=1e-4, rtol=0
            )
        model.disconnect()


class Gaps:
    """A streamer that tells the moments at which tokens came, and does something at one of them."""

    def __init__(self, at: int = -1, then: Callable[[], object] = lambda: None) -> None:
        self.times: list[float] = []
        self._at, self._then = at, then

    def put(self, value: object) -> None:
        self.times.append(time.monotonic())
        if len(self.times) == self._at:
            self._then()

    def end(self) -> None:
        pass

    @property
    def longest_s(self) -> float:
        return max(later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("mixtral")
    save_tiny_model("mixtral", directory)
    return str(directory)


@pytest.fixture(scope="module")
def whole() -> Any:
    return tiny_model("mixtral").eval()


def test_a_replica_takes_over_in_the_middle_of_a_step(warm: WarmLoopback, mixtral: str, whole: Any) -> None:
    expected, pauses_s = answer(whole, 40), []
    with expert_swarm(warm, mixtral, "*:0-1", "*:0-1", "*:0-1", "*:0-1", layers="*:2-3") as swarm:
        model = connected(swarm, mixtral)
        assert answer(model, 40) == expected
        for victim in swarm.servers[1:4]:
            gaps = Gaps(at=12, then=lambda victim=victim: victim.process.kill())
            assert answer(model, 40, streamer=gaps) == expected
            pauses_s.append(gaps.longest_s)
        model.disconnect()
    assert statistics.median(pauses_s) < 0.5, pauses_s


def test_without_a_replica_the_error_names_what_is_missing_and_the_session_goes_on_when_it_is_back(
    warm: WarmLoopback, mixtral: str, whole: Any
) -> None:
    expected = answer(whole, 40)
    with expert_swarm(warm, mixtral, "*:0", layers="*:1-3") as swarm:
        model = connected(swarm, mixtral)
        with model.inference_session(max_length=64) as session:
            ids = model.generate(ONE, session=session, do_sample=False, max_new_tokens=16, min_new_tokens=16)
            swarm.servers[1].kill()
            begun = time.monotonic()
            with pytest.raises(
                ExpertsMissing, match=r"hosts expert 0 of block \d; `swarm-server MODEL --experts \d:0`"
            ):
                while True:  # sooner or later a token wants it
                    tokens = int(ids.shape[1]) - ONE.shape[1] + 1
                    ids = model.generate(ids, session=session, do_sample=False, max_new_tokens=1, min_new_tokens=1)
                    assert tokens < 40
            assert 2 < time.monotonic() - begun < 15
            swarm.start_server(mixtral, "--experts", "*:0", "--threads", "1")
            left = 40 - (ids.shape[1] - ONE.shape[1])
            ids = model.generate(ids, session=session, do_sample=False, max_new_tokens=left, min_new_tokens=left)
            assert ids[0].tolist() == expected
        model.disconnect()


def test_what_nobody_hosts_any_more_is_taken_over_by_a_server_that_can_spare_others(
    warm: WarmLoopback, mixtral: str, whole: Any
) -> None:
    expected = answer(whole, 40)
    one_bytes = prepare_experts(ServerSettings(mixtral, experts_only=True)).expert_bytes(0)
    room_for_half = f"{PROCESS_BYTES + WORKING_BYTES + 8 * one_bytes}B"
    looking = ("--rebalance-every", "1", "--claim-wait", "1", "--settle-wait", "0.2")
    with LocalSwarm(warm) as swarm:
        swarm.start_server(mixtral, "--blocks", "0:4", "--experts", "none", "--experts-deadline", "60")
        servers = [
            swarm.start_server(mixtral, "--role", "experts", "--memory", room_for_half, "--threads", "1", *looking)
            for _ in range(3)
        ]
        hosted = [{int(block) for block in server.ready["experts"]} for server in servers if server.ready is not None]
        assert all(len(blocks) == 2 for blocks in hosted) and set().union(*hosted) == {0, 1, 2, 3}
        needed = next(one for one in range(3) if hosted[one].difference(*hosted[:one], *hosted[one + 1 :]))
        model = connected(swarm, mixtral)
        assert answer(model, 40) == expected
        assert answer(model, 40, streamer=Gaps(at=12, then=servers[needed].process.kill)) == expected
        assert set[int]().union(*asyncio.run(hosted_now(swarm, mixtral))) == {0, 1, 2, 3}
        assert answer(model, 40) == expected
        model.disconnect()


async def hosted_now(swarm: LocalSwarm, model: str) -> list[set[int]]:
    """The blocks of each server of experts that is there."""
    network = await Network.join(ClientSettings(initial_peers=tuple(swarm.initial_peers)))
    try:
        return [set(one.experts) for one in await network.experts(open_checkpoint(model).model_digest)]
    finally:
        await network.leave()


def test_a_step_that_lacks_experts_waits_for_them(warm: WarmLoopback, mixtral: str, whole: Any) -> None:
    expected = answer(whole, 16)
    with LocalSwarm(warm) as swarm:
        swarm.start_server(
            mixtral, "--blocks", "0:4", "--experts", "none", "--experts-deadline", "60", "--threads", "1"
        )
        model = connected(swarm, mixtral)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(answer, model, 16)
            time.sleep(0.5)
            assert not waiting.done()
            swarm.start_server(mixtral, "--experts", "all", "--threads", "1")
            assert waiting.result(timeout=30) == expected
        model.disconnect()


def test_who_allows_it_gets_an_answer_without_the_missing_experts_and_is_told_so(
    warm: WarmLoopback, mixtral: str
) -> None:
    other = tiny_model("mixtral").eval()
    for layer in other.model.layers:  # the local model, if its routers could not choose expert 0
        layer.mlp.gate.register_forward_hook(choose_among_the_others)
    with expert_swarm(warm, mixtral, "*:1", layers="*:2-3") as swarm:
        model = connected(swarm, mixtral, allow_degraded=True)
        with model.inference_session(max_length=64) as session:
            assert answer(model, session=session) == answer(other)
            (hop,) = session.last_step.hops
            assert hop.degraded and 0 < hop.experts_s < hop.compute_s
        swarm.start_server(mixtral, "--experts", "*:0", "--threads", "1")
        whole = tiny_model("mixtral").eval()
        deadline = time.monotonic() + 15
        while True:  # until the server of blocks has found it
            with model.inference_session(max_length=64) as session:
                found = answer(model, session=session)
                if not session.last_step.degraded:
                    break
            assert time.monotonic() < deadline
        assert found == answer(whole)
        model.disconnect()


def choose_among_the_others(gate: Any, inputs: tuple[torch.Tensor], _: object) -> tuple[torch.Tensor, ...]:
    """Mixtral's router, without expert 0."""
    logits = inputs[0].reshape(-1, gate.weight.shape[1]) @ gate.weight.T
    logits[:, 0] = float("-inf")
    weights, chosen = logits.softmax(dim=-1).topk(gate.top_k)
    return logits, weights / weights.sum(dim=-1, keepdim=True), chosen


def test_many_users_share_servers_of_experts(warm: WarmLoopback, mixtral: str, whole: Any) -> None:
    prompts = [torch.randint(3, 128, (1, 6 + seed), generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    options = {"do_sample": False, "max_new_tokens": 16, "min_new_tokens": 16}
    with expert_swarm(warm, mixtral, "*:0-1", "*:2-3") as swarm:
        model = connected(swarm, mixtral)
        start = threading.Barrier(len(prompts))

        def one(prompt: torch.Tensor) -> list[int]:
            start.wait()
            return model.generate(prompt, **options)[0].tolist()

        with ThreadPoolExecutor(len(prompts)) as pool:
            answers = list(pool.map(one, prompts))
        model.disconnect()
        chosen = {
            block: torch.zeros(4, dtype=torch.int64) for block in range(len(whole.model.layers))
        }  # by the local model's routers

        def count(block: int, output: tuple[torch.Tensor, ...]) -> None:
            chosen[block] += output[2].flatten().bincount(minlength=4)

        hooks = [
            layer.mlp.gate.register_forward_hook(lambda _, __, output, block=block: count(block, output))
            for block, layer in enumerate(whole.model.layers)
        ]
        assert answers == [whole.generate(prompt, **options)[0].tolist() for prompt in prompts]
        for hook in hooks:
            hook.remove()
        shares = asyncio.run(until_heard(swarm, mixtral, chosen))
        holds_what_is_asked_for_most(swarm, mixtral, shares)


def holds_what_is_asked_for_most(swarm: LocalSwarm, model: str, shares: dict[int, np.ndarray]) -> None:
    """A server of blocks that may choose its own experts takes a whole block, and of the others the hottest."""
    settings = ServerSettings(model, blocks=(0, 4), experts=WantedExperts.parse("auto"), memory_bytes=1 << 40)
    prepared = prepare(settings)
    plan, one_bytes = prepared.plan, prepared.expert_bytes(0)
    least = (
        plan.total_bytes
        - plan.expert_bytes
        - (plan.kv_tokens - 2048) * (plan.kv_bytes_per_token + plan.kept_bytes_per_token)
    )
    memory = f"{least + int(6.9 * one_bytes)}B"
    server = swarm.start_server(model, "--blocks", "0:4", "--experts", "auto", "--memory", memory, "--threads", "1")
    assert server.ready is not None
    kept = {int(block): frozenset(experts) for block, experts in server.ready["kept_experts"].items()}
    assert kept.keys() == {1, 2, 3}, "of the first block, everything is here"
    assert sum(map(len, kept.values())) == 2
    here = [shares[block][expert] for block in kept for expert in kept[block]]
    elsewhere = [shares[block][expert] for block in kept for expert in {0, 1, 2, 3} - kept[block]]
    assert min(here) > 0.8 * max(elsewhere), "to the coarseness of what is announced, and of when"
    swarm.servers[0].kill()
    client = connected(swarm, model)
    assert answer(client) == answer(tiny_model("mixtral").eval())
    client.disconnect()


async def until_heard(swarm: LocalSwarm, model: str, chosen: dict[int, torch.Tensor]) -> dict[int, np.ndarray]:
    """Wait until servers of experts announce that they were asked for experts so often, to the 5% of a byte, and not
    twice as often: what a step asked for before it found that another expert was missing is asked for again.

    Returns:
        By block ``[experts]``: the share of each.
    """
    network = await Network.join(ClientSettings(initial_peers=tuple(swarm.initial_peers)))
    try:
        deadline = time.monotonic() + 15
        while True:
            hosts = await network.experts(open_checkpoint(model).model_digest)
            demand = ExpertDemand.told((one.tokens_lately for one in hosts), dict.fromkeys(chosen, 4))
            told = {block: demand.chosen.get(block, np.zeros(4)) for block in chosen}
            shares = [(1 + told[block]) / (1 + counts.numpy()) for block, counts in chosen.items()]
            if np.min(shares) > 0.93 and np.max(shares) < 2:
                return {block: demand.shares(block, 4) for block in chosen}
            assert time.monotonic() < deadline, f"{told}, not {chosen}"
            await asyncio.sleep(0.2)
    finally:
        await network.leave()


def test_a_server_holds_the_experts_that_it_hosts_and_no_others(tmp_path: Path) -> None:
    experts, blocks, hidden, inner = 16, 4, 512, 1024
    config = MixtralConfig(
        vocab_size=64, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=blocks, num_attention_heads=8,
        num_key_value_heads=2, num_local_experts=experts, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    one_mib = 3 * hidden * inner * 4 * blocks / MIB  # of every block
    with LocalSwarm() as swarm:  # started cold: what a forked process shares with others would count
        keeping = ("--blocks", "0:4", "--kv-tokens", "2048", "--threads", "1")
        choices = [("--experts", "*:3"), ("--experts", "*:4-15"), (*keeping, "--experts", "none"), (*keeping,)]
        for choice in choices:
            swarm.start_server(str(tmp_path), *choice, wait=False)
        for server in swarm.servers:
            server.wait_until_ready()
        one, twelve, none, every = (
            psutil.Process(server.process.pid).memory_info().rss / MIB for server in swarm.servers
        )
    assert twelve - one == pytest.approx(11 * one_mib, rel=0.1)
    assert every - none == pytest.approx(experts * one_mib, rel=0.1)


# A stranger's expert stream


@pytest.fixture(scope="module")
def server(swarm: LocalSwarm, mixtral: str) -> LocalPeer:
    """A server of some experts."""
    return swarm.start_server(mixtral, "--experts", "1:0-2", "--threads", "1")


class Asker:
    """Says anything on an expert stream."""

    def __init__(self, node: Node, server: LocalPeer) -> None:
        self.stream = WatchedStream(node, server.peer_id, server.addresses, EXPERTS_PROTOCOL)
        self._heard: asyncio.Queue[tuple[Message, dict[str, torch.Tensor]]] = asyncio.Queue()
        self.task = asyncio.create_task(self.stream.run(lambda *heard: self._heard.put_nowait(heard)))

    async def hear(self) -> tuple[Message, dict[str, torch.Tensor]]:
        async with asyncio.timeout(15):
            return await self._heard.get()

    async def open(self, model: str) -> Asker:
        self.stream.send(OpenExperts(model=model))
        message, _ = await self.hear()
        assert message == ExpertsOpened(dtype="float32")
        return self

    async def hung_up(self) -> bool:
        async with asyncio.timeout(15):
            return isinstance((await asyncio.gather(self.task, return_exceptions=True))[0], SwarmError)

    async def vanish(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


def rows(count: int, hidden: int = 64, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(0)).to(dtype)


def numbers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


async def test_who_asks_well_is_answered_and_who_asks_badly_loses_the_stream(server: LocalPeer, mixtral: str) -> None:
    digest = open_checkpoint(mixtral).model_digest
    good = {"hidden_states": rows(2), "tokens": numbers(0, 1, 1), "experts": numbers(0, 2, 1)}
    call = ComputeExperts(call=7, block=1, tensors=[])
    bad: list[tuple[ComputeExperts, dict[str, torch.Tensor]]] = [
        (call, {**good, "more": numbers(1)}),
        (call, {**good, "hidden_states": rows(2, hidden=63)}),
        (call, {**good, "hidden_states": rows(2, dtype=torch.float16)}),
        (call, {**good, "tokens": numbers(0, 1, 2)}),
        (call, {**good, "tokens": numbers(0, 1, -1)}),
        (call, {**good, "tokens": numbers(0, 1)}),
        (call, {**good, "tokens": numbers(), "experts": numbers()}),
        (call, {**good, "experts": rows(3, hidden=1)[:, 0]}),
        (call, {"hidden_states": rows(1), "tokens": numbers(*[0] * 3000), "experts": numbers(*[0] * 3000)}),
    ]
    async with stranger() as node:
        for message, tensors in bad:
            asker = await Asker(node, server).open(digest)
            asker.stream.send(message, tensors)
            assert await asker.hung_up()
        for message in (OpenExperts(model="ab" * 32), call, Ping()):
            asker = Asker(node, server)
            asker.stream.send(message, good if message is call else None)
            if isinstance(message, OpenExperts):
                refusal, _ = await asker.hear()
                assert isinstance(refusal, Refusal) and refusal.code == "wrong_model"
            if not isinstance(message, Ping):
                assert await asker.hung_up()
            await asker.vanish()
        for block, experts in ((0, good["experts"]), (1, numbers(0, 2, 3))):
            asker = await Asker(node, server).open(digest)
            asker.stream.send(ComputeExperts(call=1, block=block, tensors=[]), {**good, "experts": experts})
            refusal, _ = await asker.hear()
            assert isinstance(refusal, Refusal) and refusal.code == "blocks_not_hosted"
            await asker.vanish()
        asker = await Asker(node, server).open(digest)
        asker.stream.send(call, good)
        answered, tensors = await asker.hear()
        assert isinstance(answered, ExpertOutputs) and answered.call == 7
        assert tensors["outputs"].shape == (3, 64) and bool(tensors["outputs"].isfinite().all())
        await asker.vanish()


async def test_a_frame_over_the_limit_closes_the_stream(server: LocalPeer) -> None:
    async with stranger() as node:
        await node.connect(server.peer_id, server.addresses)
        reader, writer = await node.open_stream(server.peer_id, EXPERTS_PROTOCOL)
        writer.write(b"".join(bytes(part) for part in encode_frame({"type": "x"}))[:4] + b"\xff" * 64)
        async with asyncio.timeout(10):
            await reader.read(-1)
        writer.close()
