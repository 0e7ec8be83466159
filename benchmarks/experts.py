"""Experts on servers of their own, beside the same model hosted as whole blocks: speed, memory, messages, failures.

The model is SmolLM2-135M as a mixture of experts (``swarm moefy``, 8 experts a block, all of which run for every
token: the text is the dense model's). One server runs all 30 blocks without their experts; 1, 2 or 4 servers share the
experts, so that each step asks every one of them 30 times. The peer is one server of whole blocks of the same model in
the same swarm. One computing thread each; the two take turns.

- `decode_ratio_to_whole_layers`: decode steps per second of one user with two servers of experts, over the peer's.
- `…_N_servers` and `…_lan`, `…_wan`: the same with N servers on loopback, and with two on hosts of the laboratory
  (`tests.netlab`), 0.25 and 10 ms away one way; `whole_…` is the peer there. `decode_16` is one step of 16 sequences,
  `prefill` a prompt of 512 tokens.
- `memory_over_weights`: what a server of half the experts holds, once it has loaded them, beyond what any server of
  experts does (that of one expert of each block, less its weights), over its weights; `working_mib_experts`: what it
  holds more after all that it did here, prompts and 16 sequences at once included.
- `messages_per_token`, `bytes_per_token`: calls of servers of experts, and tensors there and back, one user's decode.
- `failover_pause_p50_s`: the longest gap between two tokens when a server of experts is killed (SIGKILL) in the middle
  of an answer and another one hosts the same; median.
- `affinity_dispatch_ratio`: messages per token and block, if experts are placed by what fires together, over those if
  they are placed at random; a simulation (`swarm.simulation.experts`): no real router with such habits is at hand here.

`identical`: all answers are those of the peer, and the dense SmolLM2's.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.report import Report
from benchmarks.streamers import TokenTimes
from swarm.client import AutoDistributedModelForCausalLM
from swarm.commands.local_swarm import LocalPeer, LocalSwarm
from swarm.models import open_checkpoint
from swarm.models.kv_size import kv_bytes_per_position
from swarm.models.local import load_whole_model
from swarm.models.moefy import moefy
from swarm.simulation import EXPERT_STRATEGIES, MODELS, ExpertWorld, simulate_experts
from tests.netlab import Laboratory, Link, netlab_available

_EXPERTS = 8
_PROMPT = 512
_ROWS = 16
_KV_TOKENS = 16_384
_LINKS = {"lan": Link(delay_s=0.00025, bandwidth_bps=1e9), "wan": Link(delay_s=0.010, bandwidth_bps=1e8)}
_TEXT = "The sea is wide and the wind is cold, and nobody on the island remembers a summer like this one. "
_MIB = 1024**2


@dataclass(frozen=True)
class Way:
    """A model whose sessions run on one server of blocks."""

    blocks: LocalPeer
    model: Any

    def step_s(self, prompt: torch.Tensor, tokens: int) -> tuple[float, list[list[int]]]:
        """(median seconds of a decode step, the answers)"""
        times: list[float] = []
        with self.model.inference_session(max_length=prompt.shape[1] + tokens) as session:

            def note(_: torch.Tensor, __: object) -> torch.Tensor:
                times.append(time.perf_counter())
                return torch.zeros(prompt.shape[0], dtype=torch.bool)

            ids = self.model.generate(
                prompt, session=session, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens,
                stopping_criteria=[note],
            )  # fmt: skip
        gaps = [later - earlier for earlier, later in itertools.pairwise(times[1:])]
        return statistics.median(gaps), ids.tolist()

    def prefill_s(self, prompt: torch.Tensor) -> float:
        """Seconds until the first token, once the session stands."""
        with self.model.inference_session(max_length=prompt.shape[1] + 8) as session:
            session.step(torch.zeros(1, 1, self.model.config.hidden_size))
            session.position = 0
            begun = time.perf_counter()
            self.model.generate(prompt, session=session, do_sample=False, max_new_tokens=1)
            return time.perf_counter() - begun


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--distance", choices=_LINKS, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    report, options = Report.with_options(parser)
    torch.set_num_threads(1)
    if options.distance:  # a process of its own: its threads must all be made on the client's host
        report.finish(_at_a_distance(options.model, options.distance, report))
        return
    dense = open_checkpoint("smollm2")
    with tempfile.TemporaryDirectory(prefix="swarm-experts-") as directory:
        report.progress("turning SmolLM2 into a mixture of experts")
        model = Path(directory) / "moe"
        moefy(dense, model, _EXPERTS)
        prompt = dense.tokenizer()(_TEXT, return_tensors="pt").input_ids
        tokens = 12 if report.quick else 24
        local = load_whole_model(dense)
        text = local.generate(prompt, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens).tolist()
        figures: dict[str, Any] = {"identical": True}
        for count in (2,) if report.quick else (1, 2, 4):
            figures |= _on_loopback(str(model), count, prompt, text, figures, report)
        if netlab_available() is None:
            for name in ("wan",) if report.quick else _LINKS:
                figures |= _in_another_process(str(model), name, figures, report)
        figures |= _failover(str(model), prompt, 3 if report.quick else 9, figures, report)
    figures["decode_ratio_to_whole_layers"] = (
        figures["decode_tokens_per_s_2_servers"] / figures["whole_decode_tokens_per_s_2_servers"]
    )
    figures |= _affinity(report)
    report.finish(figures)


@contextlib.contextmanager
def _ways(swarm: LocalSwarm, model: str, count: int, lab: Laboratory | None = None) -> Iterator[tuple[Way, Way]]:
    """(whole blocks, blocks whose experts are on `count` servers)"""
    options = ("--blocks", "0:30", "--threads", "1", "--kv-tokens", str(_KV_TOKENS), "--no-prompt-reuse")

    def host(name: str) -> dict[str, Any]:
        return {"host": lab.host(name)} if lab is not None else {}

    whole = swarm.start_server(model, *options, wait=False, **host("whole"))
    blocks = swarm.start_server(model, *options, "--experts", "none", wait=False, **host("blocks"))
    each = _EXPERTS // count
    for number in range(count):
        choice = f"*:{number * each}-{(number + 1) * each - 1}"
        swarm.start_server(model, "--experts", choice, "--threads", "1", wait=False, **host(f"experts{number}"))
    for server in swarm.servers:
        server.wait_until_ready()
    ways = [
        Way(
            server,
            AutoDistributedModelForCausalLM.from_pretrained(
                model, initial_peers=swarm.initial_peers, allowed_servers=(server.peer_id,)
            ),
        )
        for server in (whole, blocks)
    ]
    try:
        yield ways[0], ways[1]
    finally:
        for way in ways:
            way.model.disconnect()


def _on_loopback(
    model: str, count: int, prompt: torch.Tensor, text: list[list[int]], before: dict[str, Any], report: Report
) -> dict[str, Any]:
    report.progress(f"{count} servers of experts on loopback")
    with LocalSwarm() as swarm, _ways(swarm, model, count) as (whole, apart):
        experts = swarm.servers[2]
        figures = _memory(swarm, model, whole, apart) if count == 2 else {}
        loaded = _resident(experts)
        figures |= _speeds(whole, apart, f"{count}_servers", prompt, text, before, report)
        if count == 2:
            figures["working_mib_experts"] = (_resident(experts) - loaded) / _MIB
    return {**figures, **_messages(model, count, prompt)}


def _in_another_process(model: str, name: str, before: dict[str, Any], report: Report) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.experts", "--distance", name, "--model", model, "--json"]
    done = subprocess.run([*command, *(["--quick"] if report.quick else [])], stdout=subprocess.PIPE, check=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**figures, "identical": before["identical"] and figures["identical"]}


def _at_a_distance(model: str, name: str, report: Report) -> dict[str, Any]:
    report.progress(f"two servers of experts over {name} links")
    prompt = open_checkpoint(model).tokenizer()(_TEXT, return_tensors="pt").input_ids
    hosts = ["client", "bootstrap", "whole", "blocks", "experts0", "experts1"]
    with (
        Laboratory(hosts, _LINKS[name]) as lab,
        LocalSwarm(lab.host("bootstrap")) as swarm,
        lab.inside("client"),
        _ways(swarm, model, 2, lab) as (whole, apart),
    ):
        return _speeds(whole, apart, name, prompt, None, {"identical": True}, report)


def _speeds(
    whole: Way,
    apart: Way,
    key: str,
    prompt: torch.Tensor,
    text: list[list[int]] | None,
    before: dict[str, Any],
    report: Report,
) -> dict[str, Any]:
    """Args: text: what the dense model answers; None: unknown."""
    rounds, tokens = (2, 12) if report.quick else (3, 24)
    many = torch.cat([prompt.roll(row, dims=1) for row in range(_ROWS)])
    long = prompt.repeat(1, _PROMPT // prompt.shape[1] + 1)[:, :_PROMPT]
    seconds: dict[str, list[float]] = {}
    identical = before["identical"]
    for round_ in range(rounds + 1):
        answers = []
        for name, way in (("whole_", whole), ("", apart)):
            one_s, one = way.step_s(prompt, tokens)
            many_s, others = way.step_s(many, 6)
            answers.append((one, others))
            if round_:  # the first only warms up
                seconds.setdefault(f"{name}decode", []).append(one_s)
                seconds.setdefault(f"{name}decode_16", []).append(many_s / _ROWS)
                seconds.setdefault(f"{name}prefill", []).append(way.prefill_s(long) / _PROMPT)
        identical &= answers[0] == answers[1] and text in (None, answers[0][0])
    figures = {f"{what}_tokens_per_s_{key}": 1 / statistics.median(all_s) for what, all_s in seconds.items()}
    report.progress("  " + ", ".join(f"{what} {value:.1f}" for what, value in figures.items()))
    return {"identical": identical, **figures}


def _memory(swarm: LocalSwarm, model: str, whole: Way, apart: Way) -> dict[str, Any]:
    """Beside a server of one expert of each block: what others hold more, over what they ought to."""
    checkpoint = open_checkpoint(model)
    config = checkpoint.config
    expert_bytes = 3 * config.hidden_size * config.intermediate_size * 4 * config.num_hidden_layers
    rest_bytes = 4 * sum(map(checkpoint.block_elements, range(config.num_hidden_layers))) - _EXPERTS * expert_bytes
    kv_bytes = _KV_TOKENS * kv_bytes_per_position(config, torch.float32) * config.num_hidden_layers
    least = swarm.start_server(model, "--experts", "*:0", "--threads", "1")
    fixed = _resident(least) - expert_bytes
    servers = {"blocks": (apart.blocks, rest_bytes), "whole": (whole.blocks, rest_bytes + _EXPERTS * expert_bytes)}
    servers |= {"experts": (swarm.servers[2], _EXPERTS // 2 * expert_bytes)}
    figures: dict[str, Any] = {"declared_kv_mib": kv_bytes / _MIB}
    for name, (server, weights) in servers.items():
        figures[f"resident_mib_{name}"] = _resident(server) / _MIB
        figures[f"weights_mib_{name}"] = weights / _MIB
    least.process.terminate()
    least.process.wait()
    swarm.servers.remove(least)
    experts, weights = servers["experts"]
    figures["memory_over_weights"] = (_resident(experts) - fixed) / weights
    return figures


def _resident(server: LocalPeer) -> float:
    return float(psutil.Process(server.process.pid).memory_info().rss)


def _messages(model: str, count: int, prompt: torch.Tensor) -> dict[str, Any]:
    """What one token costs: in a swarm that sees nothing but single tokens, as servers of experts say when they end."""
    with LocalSwarm() as swarm, _ways(swarm, model, count) as (_, apart):
        _, answers = apart.step_s(prompt[:, :1], 16)
        steps = len(answers[0]) - 1
        done = []
        for host in swarm.servers[2:]:
            host.process.terminate()
            assert host.process.stdout is not None
            events = map(json.loads, host.process.stdout.read().decode().splitlines())
            done.append(next(event for event in events if event.get("event") == "left"))
    return {
        f"messages_per_token_{count}_servers": sum(one["calls"] for one in done) / steps,
        f"bytes_per_token_{count}_servers": sum(one["received_bytes"] + one["sent_bytes"] for one in done) / steps,
    }


def _failover(model: str, prompt: torch.Tensor, faults: int, before: dict[str, Any], report: Report) -> dict[str, Any]:
    pauses: list[float] = []
    identical = before["identical"]
    with LocalSwarm() as swarm:
        swarm.start_server(model, "--blocks", "0:30", "--experts", "none", "--threads", "1", wait=False)
        for choice in ("*:0-3", "*:4-7") * 2:
            swarm.start_server(model, "--experts", choice, "--threads", "1", wait=False)
        for server in swarm.servers:
            server.wait_until_ready()
        remote = AutoDistributedModelForCausalLM.from_pretrained(model, initial_peers=swarm.initial_peers)
        expected: list[int] = []
        for fault in range(faults + 1):
            victim = swarm.servers[1 + fault % 4]

            def kill(token: int, victim: LocalPeer = victim, fault: int = fault) -> None:
                if fault and token == 8:
                    victim.process.kill()

            times = TokenTimes(kill)
            ids = remote.generate(prompt, do_sample=False, max_new_tokens=20, min_new_tokens=20, streamer=times)
            expected = expected or ids.tolist()
            identical &= ids.tolist() == expected
            if not fault:
                continue
            pauses.append(max(times.gaps_s[5:]))
            report.progress(f"  a server of experts killed: the longest gap is {pauses[-1]:.2f} s")
            victim.process.wait()
            swarm.servers[1 + fault % 4] = swarm.start_server(
                model, "--experts", ("*:0-3", "*:4-7")[fault % 2], "--threads", "1"
            )
            swarm.servers.pop()
            time.sleep(5)  # until it is found
        remote.disconnect()
    return {
        "identical": identical,
        "failover_pause_p50_s": statistics.median(pauses),
        "failover_pause_max_s": max(pauses),
        "failovers": len(pauses),
    }


def _affinity(report: Report) -> dict[str, Any]:
    """16 servers of experts of a model like Qwen3 235B: 128 in a block, 8 for a token (`swarm simulate --experts`)."""
    report.progress("simulating where experts are placed")
    world = ExpertWorld(MODELS["qwen3"], duration_s=1800.0)
    ours, random = (simulate_experts(world, EXPERT_STRATEGIES[name]) for name in ("ours", "random"))
    return {
        "affinity_dispatch_ratio": ours.messages / random.messages,
        "messages_per_token_and_block_ours": ours.messages,
        "messages_per_token_and_block_random": random.messages,
    }


if __name__ == "__main__":
    main()
