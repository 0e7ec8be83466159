"""Three distant servers: decode and prefill over the three networks of the Petals paper, beside what physics allows.

SmolLM2-135M in fp32 on three servers (blocks 0-9, 10-19, 20-29), one computing thread each (see `--threads`), on hosts
of the laboratory (`tests.netlab`); the client and the bootstrap peer have hosts of their own. The networks are those
of the performance table of Borzunov et al., "Petals" (2022, 2023): 1 Gbit/s and 5 ms, 100 Mbit/s and 5 ms, 100 Mbit/s
and 100 ms of round trip, between any two hosts. *Star*: every hidden state returns to the client (``chain=False``).
*Chain*: servers send straight to one another. Both are open at once, take turns, and must give the same logits, bit
for bit. Speeds are medians over all steps. Shares of the bound are medians over single steps, each with its own
computing, and ratios of chain to star medians over turns: a machine that others use changes its speed from minute to
minute.

A decode step is what Petals' own benchmark counts as one: a token goes in, and the next one is chosen. It is one call
of the model, embedding and head included, because that is what a person waits for; sampling adds nothing to it. The
text is a chapter of Python's documentation. Sessions stand before they are timed: looking servers up and dialling
them is not part of a step.

The bounds assume four journeys, client → 1 → 2 → 3 → client, and nothing but

- decode: the four delays + what the three servers computed + what the client computed (embedding, norm, head). The
  time on the wire (0.2 ms for each journey at 100 Mbit/s) and every message, copy and thread switch are not in it.
- prefill: the same delays and the client's computing + the longest of three things that are busy all the time in a
  perfect pipeline: one link (the fp32 hidden states of 512 tokens at its bandwidth), the busiest server,
  and this machine's cores (all three servers on them). How busy a server was is its processor time, which does not
  grow when it has to wait for a core. TCP's slow start is not in it.
"""

from __future__ import annotations

import argparse
import os
import pydoc_data.topics
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.report import Report
from swarm.client import AutoDistributedModelForCausalLM
from swarm.client.remote_layers import RemoteCache
from swarm.commands.local_swarm import LocalSwarm
from tests.netlab import Laboratory, Link, netlab_available

_SPANS = ("0:10", "10:20", "20:30")
_SERVERS = ("server1", "server2", "server3")
_CONTEXTS = (128, 1024)
_PREFILL = 512
_TURN = 4
"""Decode steps of one mode before it is the other's turn."""
_JOURNEYS = len(_SPANS) + 1
_SYSCTL = Path("/proc/sys/net/ipv4")
_CORES = os.cpu_count() or 1


@dataclass(frozen=True)
class Network:
    """One row of the table."""

    key: str
    title: str
    link: Link


NETWORKS = (
    Network("a", "1 Gbit/s, 5 ms", Link(delay_s=0.0025, bandwidth_bps=1e9)),
    Network("b", "100 Mbit/s, 5 ms", Link(delay_s=0.0025, bandwidth_bps=1e8)),
    Network("c", "100 Mbit/s, 100 ms", Link(delay_s=0.05, bandwidth_bps=1e8)),
)


@dataclass(frozen=True)
class Call:
    """One call of a model, in seconds."""

    total_s: float
    computes_s: tuple[float, ...]
    """Each server's computing."""
    client_s: float
    """What is not the session's: embedding, norm and head."""


class Mode:
    """The model with its layers in star or in chain, and one session."""

    def __init__(self, name: str, initial_peers: list[str]) -> None:
        self.name = name
        self.model = AutoDistributedModelForCausalLM.from_pretrained(
            "smollm2", initial_peers=initial_peers, chain=name == "chain"
        )
        self.session = self.model.inference_session(max_length=max(_CONTEXTS) + 64)
        self._cache = RemoteCache(self.session)

    @torch.no_grad()
    def call(self, ids: torch.Tensor) -> tuple[torch.Tensor, Call]:
        """Run new tokens ``[1, n]``; returns the logits after the last of them, and what it cost."""
        begun = time.perf_counter()
        logits = self.model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits
        total_s = time.perf_counter() - begun
        step = self.session.last_step
        return logits, Call(total_s, tuple(hop.compute_s for hop in step.hops), total_s - step.total_s)

    def advance(self, text: torch.Tensor, *, since: int) -> tuple[torch.Tensor, Call]:
        """:meth:`call` with the text from position `since` on, or from where the session is if that is earlier."""
        self.session.position = min(since, self.session.position)
        return self.call(text[:, self.session.position :])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of each server (default: 1)")
    report, options = Report.with_options(parser)
    if (reason := netlab_available()) is not None:
        sys.exit(f"This benchmark needs a laboratory of network namespaces, which this machine cannot have: {reason}.")
    torch.set_num_threads(1)
    load_before = os.getloadavg()[0]
    with (
        Laboratory(["client", "bootstrap", *_SERVERS]) as lab,
        LocalSwarm(lab.host("bootstrap")) as swarm,
        lab.inside("client"),  # all threads and processes of the client are made in here
    ):
        report.progress("starting three servers")
        servers = [
            swarm.start_server(
                "smollm2",
                "--blocks",
                span,
                "--threads",
                str(options.threads),
                "--no-prompt-reuse",
                wait=False,
                host=lab.host(host),
            )
            for span, host in zip(_SPANS, _SERVERS, strict=True)
        ]
        for server in servers:
            server.wait_until_ready()
        processes = [psutil.Process(server.process.pid) for server in servers]
        modes = [Mode(name, swarm.initial_peers) for name in ("chain", "star")]
        figures: dict[str, Any] = {
            "tcp_congestion_control": (_SYSCTL / "tcp_congestion_control").read_text().strip(),
            "tcp_slow_start_after_idle": int((_SYSCTL / "tcp_slow_start_after_idle").read_text()),
            "threads": options.threads,
            "load_before": load_before,
        }
        for network in NETWORKS:
            hosts = ("client", *_SERVERS)
            for index, source in enumerate(hosts):
                for target in hosts[index + 1 :]:
                    lab.set_link(source, target, network.link)
            figures |= _measure(network, modes, processes, options.threads, report)
        for mode in modes:
            mode.session.close()
            mode.model.disconnect()
    figures["chain_share_of_bound_c"] = min(figures[f"c_chain_{context}_share_of_bound"] for context in _CONTEXTS)
    figures["chain_over_star_c"] = min(figures[f"c_chain_over_star_{context}"] for context in _CONTEXTS)
    report.progress(table(figures))
    report.finish(figures)


def _measure(
    network: Network, modes: list[Mode], servers: list[psutil.Process], threads: int, report: Report
) -> dict[str, Any]:
    """All cells of one network."""
    steps, prefills = (8, 2) if report.quick else (32, 7)
    text = _text(modes[0])
    key = network.key
    figures: dict[str, Any] = {}
    for mode in modes:
        mode.advance(text[:, :16], since=0)  # dials, and meets the new link
    figures |= _prefill_figures(network, modes, text[:, :_PREFILL], servers, threads, prefills)
    report.progress(f"{network.title}: prefill of {_PREFILL} tokens: {_spoken(figures, key, 'prefill_tokens_per_s')}")
    for context in sorted(_CONTEXTS, reverse=True):  # the longest goes on after the prefill, the others roll back
        figures |= _decode_figures(network, context, _decode(modes, text[:, :context], steps // _TURN))
        report.progress(f"{network.title}: decode after {context}: {_spoken(figures, key, f'{context}_steps_per_s')}")
    relayed = {mode.name: mode.session.relayed for mode in modes}
    figures[f"{key}_chain_relayed_boundaries"] = len(relayed["chain"])
    if relayed["chain"]:
        report.progress(f"ATTENTION: this was no chain: the client relayed at blocks {relayed['chain']}")
    if recoveries := [recovery for mode in modes for recovery in mode.session.recoveries]:
        raise SystemExit(f"servers were lost, so the figures mean nothing: {recoveries}")
    return figures


def _prefill_figures(
    network: Network, modes: list[Mode], ids: torch.Tensor, servers: list[psutil.Process], threads: int, rounds: int
) -> dict[str, float]:
    """The first round only warms up."""
    seconds: dict[str, list[float]] = {"chain": [], "star": [], "bound": []}
    transfer_s = ids.shape[1] * modes[0].model.config.hidden_size * 32 / network.link.bandwidth_bps
    for _ in range(1 + rounds):
        logits = {}
        for mode in modes:
            before = _processor_times_s(servers)
            logits[mode.name], call = mode.advance(ids, since=0)
            after = _processor_times_s(servers)
            used_s = [now - earlier for now, earlier in zip(after, before, strict=True)]
            seconds[mode.name].append(call.total_s)
            if mode.name == "chain":
                busiest_s = max(transfer_s, *(one / threads for one in used_s), sum(used_s) / _CORES)
                seconds["bound"].append(_JOURNEYS * network.link.delay_s + call.client_s + busiest_s)
        _check_equal(logits)
    figures = {
        f"{name}_prefill_tokens_per_s": ids.shape[1] / statistics.median(mine[1:]) for name, mine in seconds.items()
    }
    shares = [bound_s / chain_s for bound_s, chain_s in zip(seconds["bound"], seconds["chain"], strict=True)]
    figures["chain_prefill_share_of_bound"] = statistics.median(shares[1:])
    return {f"{network.key}_{name}": value for name, value in figures.items()}


def _processor_times_s(servers: list[psutil.Process]) -> list[float]:
    return [sum(server.cpu_times()[:2]) for server in servers]


def _decode(modes: list[Mode], context: torch.Tensor, turns: int) -> dict[str, list[list[Call]]]:
    """Greedy decode steps after `context`, of which caches may hold a part; turn by turn."""
    calls: dict[str, list[list[Call]]] = {mode.name: [] for mode in modes}
    last = {mode.name: mode.advance(context, since=context.shape[1] - 1)[0] for mode in modes}
    _check_equal(last)
    for _ in range(turns):
        for mode in modes:
            turn = []
            for _ in range(1 + _TURN):
                last[mode.name], call = mode.call(last[mode.name].argmax(-1))
                turn.append(call)
            calls[mode.name].append(turn[1:])  # the first only warms up
        _check_equal(last)
    return calls


def _decode_figures(network: Network, context: int, calls: dict[str, list[list[Call]]]) -> dict[str, float]:
    chain, star = ([call for turn in calls[name] for call in turn] for name in ("chain", "star"))
    delays_s = _JOURNEYS * network.link.delay_s
    bounds_s = [delays_s + sum(call.computes_s) + call.client_s for call in chain]
    star_detour_s = (2 * len(_SPANS) - _JOURNEYS) * network.link.delay_s
    pairs = [
        (statistics.median(one.total_s for one in ours), statistics.median(one.total_s for one in theirs))
        for ours, theirs in zip(calls["chain"], calls["star"], strict=True)
    ]
    figures = {
        f"chain_{context}_steps_per_s": 1 / statistics.median(call.total_s for call in chain),
        f"star_{context}_steps_per_s": 1 / statistics.median(call.total_s for call in star),
        f"bound_{context}_steps_per_s": 1 / statistics.median(bounds_s),
        f"chain_{context}_share_of_bound": statistics.median(
            bound_s / call.total_s for bound_s, call in zip(bounds_s, chain, strict=True)
        ),
        f"chain_over_star_{context}": statistics.median(star_s / chain_s for chain_s, star_s in pairs),
        f"bound_over_bound_of_star_{context}": statistics.median(1 + star_detour_s / bound_s for bound_s in bounds_s),
        f"chain_{context}_compute_ms": 1e3 * statistics.median(sum(call.computes_s) for call in chain),
        f"chain_{context}_client_ms": 1e3 * statistics.median(call.client_s for call in chain),
        f"chain_{context}_rest_ms": 1e3
        * statistics.median(call.total_s - bound_s for bound_s, call in zip(bounds_s, chain, strict=True)),
    }
    return {f"{network.key}_{name}": value for name, value in figures.items()}


def _check_equal(logits: dict[str, torch.Tensor]) -> None:
    if not torch.equal(logits["chain"], logits["star"]):
        raise SystemExit("chain and star give different logits: a speed means nothing")


def _text(mode: Mode) -> torch.Tensor:
    """``[1, longest context]`` token ids."""
    chapter = pydoc_data.topics.topics["specialnames"]
    ids = mode.model.tokenizer()(chapter, return_tensors="pt").input_ids
    return ids[:, : max(_CONTEXTS)]


def table(figures: dict[str, Any]) -> str:
    """The figures in the shape of the paper's table, in Markdown."""
    heads = ["network, round trip", "mode", *(f"steps/s at {context}" for context in _CONTEXTS), "prefill tokens/s"]
    rows = [heads, ["-" * max(len(head), 5) for head in heads]]
    for network in NETWORKS:
        for mode in ("chain", "star", "bound"):
            cells = [f"{figures[f'{network.key}_{mode}_{context}_steps_per_s']:.2f}" for context in _CONTEXTS]
            prefill = f"{figures[f'{network.key}_{mode}_prefill_tokens_per_s']:.0f}"
            rows.append([network.title if mode == "chain" else "", mode, *cells, prefill])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows)


def _spoken(figures: dict[str, Any], key: str, cell: str) -> str:
    return ", ".join(f"{mode} {figures[f'{key}_{mode}_{cell}']:.3g}/s" for mode in ("chain", "star", "bound"))


if __name__ == "__main__":
    main()
