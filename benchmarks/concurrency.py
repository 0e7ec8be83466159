"""Many users at once on two servers: how fast are all of them together, beside one alone?

SmolLM2-135M, in fp32 and then with int8 weights, on two servers of 15 blocks, one computing thread each. Every client
is a thread with a session of its own, which generates greedily after a prompt of its own; all run in one process, so
that embedding and head of all clients, too, share this machine with the servers. One client alone and many take turns
in one run, and a figure is the median of its rounds. Every answer must be what the same client gets alone. A gap is the
time between two tokens of one client. Figures without a name of a precision are those of fp32.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.report import Report
from benchmarks.users import PROMPTS, User, answer_together
from swarm.client import AutoDistributedModelForCausalLM
from swarm.commands.local_swarm import LocalSwarm


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", default="1,4,16", help="how many, with commas; the first is the measure (1,4,16)")
    parser.add_argument("--precisions", default="fp32,int8", help="fp32, or what servers quantize to (fp32,int8)")
    report, options = Report.with_options(parser)
    counts = [int(count) for count in options.clients.split(",")]
    torch.set_num_threads(1)
    figures: dict[str, Any] = {"identical": True}
    for precision in options.precisions.split(","):
        found = _measure(report, counts, precision)
        figures["identical"] &= found.pop("identical")
        figures |= {key if precision == "fp32" else f"{key}_{precision}": value for key, value in found.items()}
        for count in counts:
            figures[f"speedup_{count}_{precision}"] = figures.pop(
                f"speedup_{count}" if precision == "fp32" else f"speedup_{count}_{precision}"
            )
    report.finish(figures)


def _measure(report: Report, counts: Sequence[int], precision: str) -> dict[str, Any]:
    rounds, tokens = (2, 24) if report.quick else (5, 48)
    scheme = None if precision == "fp32" else precision
    report.progress(f"starting two servers, {precision}")
    with LocalSwarm() as swarm:
        quantize = ("--quantize", scheme) if scheme else ()
        swarm.start_servers("smollm2", ["0:15", "15:30"], "--threads", "1", *quantize)
        model = AutoDistributedModelForCausalLM.from_pretrained(
            "smollm2", initial_peers=swarm.initial_peers, quantization=scheme
        )
        tokenizer = model.tokenizer()
        users = [User(tokenizer(text, return_tensors="pt").input_ids) for text in PROMPTS]
        alone = []
        for user in users[: max(counts)]:
            answer_together(model, [user], tokens)
            alone.append(user.ids)
        identical = True
        speeds: dict[int, list[float]] = {count: [] for count in counts}
        shares: dict[int, list[float]] = {count: [] for count in counts}
        gaps: dict[int, list[float]] = {count: [] for count in counts}
        for round_ in range(rounds):
            for count in counts:
                together = users[:count]
                answer_together(model, together, tokens)
                identical &= all(user.ids == ids for user, ids in zip(together, alone, strict=False))
                gaps_s = [user.times.gaps_s[1:] for user in together]
                each = [1 / statistics.mean(one) for one in gaps_s]
                speeds[count].append(sum(each))
                shares[count].append(min(each) / statistics.mean(each))
                gaps[count] += [gap for one in gaps_s for gap in one]
            spoken = ", ".join(f"{count}: {mine[-1]:.1f}" for count, mine in speeds.items())
            report.progress(f"round {round_ + 1} of {rounds}: tokens/s of all clients together: {spoken}")
        model.disconnect()
    figures: dict[str, Any] = {"identical": identical}
    for count in counts:
        figures[f"tokens_per_s_{count}"] = statistics.median(speeds[count])
        figures[f"gap_p50_ms_{count}"] = 1e3 * statistics.median(gaps[count])
        figures[f"gap_p95_ms_{count}"] = 1e3 * statistics.quantiles(gaps[count], n=20)[-1]
        figures[f"slowest_share_of_mean_{count}"] = min(shares[count])
        figures[f"speedup_{count}"] = statistics.median(
            many / one for many, one in zip(speeds[count], speeds[counts[0]], strict=True)
        )
    return figures


if __name__ == "__main__":
    main()
