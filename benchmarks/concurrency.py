"""Many users at once on two servers: how fast are all of them together, beside one alone?

SmolLM2-135M in fp32 on two servers of 15 blocks, one computing thread each. Every client is a thread with a session of
its own, which generates greedily after a prompt of its own; all run in one process, so that embedding and head of all
clients, too, share this machine with the servers. One client alone and many take turns in one run, and a figure is the
median of its rounds. Every answer must be what the same client gets alone. A gap is the time between two tokens of one
client.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.report import Report
from swarm.client import AutoDistributedModelForCausalLM
from swarm.commands.local_swarm import LocalSwarm

_PROMPTS = (
    "The history of the sea is", "A short list of colours:", "In the year 1890,", "My neighbour has a dog that",
    "The capital of France", "When it rains in autumn,", "The first rule of cooking is", "Mathematics begins with",
    "On the table there was", "Nobody knows why the", "A good bridge must", "The train to the coast",
    "Water boils when", "Every evening the old man", "The opposite of cold", "To build a house you need",
)  # fmt: skip


@dataclass
class Client:
    """One user."""

    prompt: torch.Tensor
    times: list[float] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)

    def generate(self, model: Any, tokens: int, start: threading.Barrier) -> None:
        """Answer; begins when all are ready."""
        self.times = []
        with model.inference_session(max_length=self.prompt.shape[1] + tokens) as session:
            start.wait()
            ids = model.generate(
                self.prompt,
                session=session,
                streamer=self,
                do_sample=False,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
            )
        self.ids = ids[0].tolist()

    def put(self, value: object) -> None:
        """(streamer) A token, or first the prompt."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """(streamer)"""

    @property
    def gaps_s(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.times[2:], self.times[3:], strict=False)]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", default="1,4,16", help="how many, with commas; the first is the measure (1,4,16)")
    report, options = Report.with_options(parser)
    counts = [int(count) for count in options.clients.split(",")]
    rounds, tokens = (2, 24) if report.quick else (5, 48)
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    report.progress("starting two servers")
    with LocalSwarm() as swarm:
        swarm.start_servers("smollm2", ["0:15", "15:30"], "--threads", "1")
        model = AutoDistributedModelForCausalLM.from_pretrained("smollm2", initial_peers=swarm.initial_peers)
        tokenizer = model.tokenizer()
        clients = [Client(tokenizer(text, return_tensors="pt").input_ids) for text in _PROMPTS]
        alone = []
        for client in clients[: max(counts)]:
            _run(model, [client], tokens)
            alone.append(client.ids)
        identical = True
        speeds: dict[int, list[float]] = {count: [] for count in counts}
        shares: dict[int, list[float]] = {count: [] for count in counts}
        gaps: dict[int, list[float]] = {count: [] for count in counts}
        for round_ in range(rounds):
            for count in counts:
                together = clients[:count]
                _run(model, together, tokens)
                identical &= all(client.ids == ids for client, ids in zip(together, alone, strict=False))
                each = [1 / statistics.mean(client.gaps_s) for client in together]
                speeds[count].append(sum(each))
                shares[count].append(min(each) / statistics.mean(each))
                gaps[count] += [gap for client in together for gap in client.gaps_s]
            spoken = ", ".join(f"{count}: {mine[-1]:.1f}" for count, mine in speeds.items())
            report.progress(f"round {round_ + 1} of {rounds}: tokens/s of all clients together: {spoken}")
        model.disconnect()
    first = counts[0]
    for count in counts:
        figures[f"tokens_per_s_{count}"] = statistics.median(speeds[count])
        figures[f"gap_p50_ms_{count}"] = 1e3 * statistics.median(gaps[count])
        figures[f"gap_p95_ms_{count}"] = 1e3 * statistics.quantiles(gaps[count], n=20)[-1]
        figures[f"slowest_share_of_mean_{count}"] = min(shares[count])
        figures[f"speedup_{count}_fp32"] = statistics.median(
            many / one for many, one in zip(speeds[count], speeds[first], strict=True)
        )
    report.finish({"identical": identical, **figures})


def _run(model: Any, clients: list[Client], tokens: int) -> None:
    start = threading.Barrier(len(clients))
    threads = [threading.Thread(target=client.generate, args=(model, tokens, start)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
