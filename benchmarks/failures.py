"""How much speed is left when servers fail: the failure experiment of the Petals paper (Borzunov et al. 2023).

SmolLM2 in four stages of two servers each, on loopback, one thread each. In every step, each of the four servers in
use loses its sessions with the given probability (benchmarks/failing_server.py). Answers of 128 and of 1024 tokens are
generated for every probability, three each without failures and at 1e-3, in turns; each must equal the local model's.
Beside our speed stand two others:
*restart*, which begins the answer anew after every failure, and *no cache*, which runs the whole prefix in every step.
Both would take hours, so they are computed from what this run measured: the time of a step, and of a prefill of several
lengths. With f = 1 - (1 - p)^4 the chance that a step fails, an answer of n steps takes ((1 - f)^-n - 1) / f steps with
restarts, and a step without a cache is repeated 1 / (1 - f) times.
"""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import Report
from benchmarks.streamers import TokenTimes
from swarm.client import AutoDistributedModelForCausalLM
from swarm.commands.local_swarm import LocalSwarm
from swarm.models import open_checkpoint
from swarm.models.local import load_whole_model

_STAGES = ("0:8", "8:16", "16:23", "23:30")
_PROBABILITIES = (0.0, 1e-4, 1e-3, 1e-2)
_COMPARED = 1e-3
"""Where the speed that is kept is quoted."""
_PROMPT = "The history of the sea is the history of"


@dataclass(frozen=True)
class _Answer:
    tokens_per_s: float
    step_s: float
    failures: int


def main() -> None:
    """Run the benchmark."""
    report = Report.from_command_line(__doc__ or "")
    lengths = (64, 128) if report.quick else (128, 1024)
    torch.set_num_threads(1)
    checkpoint = open_checkpoint("smollm2")
    inputs = checkpoint.tokenizer()(_PROMPT, return_tensors="pt")
    expected = _generate(load_whole_model(checkpoint), inputs, max(lengths), {})[0]
    with tempfile.TemporaryDirectory() as directory, LocalSwarm() as swarm:
        probability_file = Path(directory) / "probability"
        probability_file.write_text("0")
        os.environ["SWARM_FAILURES"] = str(probability_file)
        report.progress(f"starting {2 * len(_STAGES)} servers")
        servers = [
            swarm.start_server(
                "smollm2",
                "--blocks",
                span,
                "--threads",
                "1",
                "--no-prompt-reuse",
                wait=False,
                program="benchmarks.failing_server",
            )
            for span in _STAGES * 2
        ]
        for server in servers:
            server.wait_until_ready()
        model = AutoDistributedModelForCausalLM.from_pretrained("smollm2", initial_peers=swarm.initial_peers)
        prefix_s = _time_without_cache(model, inputs, max(lengths))
        figures: dict[str, Any] = {}

        def answer(length: int, probability: float) -> _Answer:
            probability_file.write_text(str(probability))
            with model.inference_session(max_length=max(lengths) + 64) as session:
                ids, step_s, total_s = _generate(model, inputs, length, {"session": session})
                failures = len(session.recoveries)
            probability_file.write_text("0")
            if not torch.equal(ids, expected[:, : ids.shape[1]]):
                raise SystemExit(f"after {failures} failures the tokens differ: a speed means nothing")
            report.progress(
                f"{length} tokens, failures at {probability:g}: {length / total_s:.2f} tokens/s ({failures} failures)"
            )
            return _Answer(length / total_s, step_s, failures)

        for length in lengths:
            # Where the two are compared they take turns, for the machine's own speed changes, too.
            turns = [(answer(length, 0.0), answer(length, _COMPARED)) for _ in range(1 if report.quick else 3)]
            answers = {0.0: [calm for calm, _ in turns], _COMPARED: [failing for _, failing in turns]}
            calm_step_s = statistics.median(calm.step_s for calm in answers[0.0])
            for probability in _PROBABILITIES:
                ours = answers.get(probability) or [answer(length, probability)]
                fails = 1 - (1 - probability) ** len(_STAGES)
                restarts = ((1 - fails) ** -length - 1) / fails if fails else length
                key = f"{length}_at_{probability:g}"
                figures[f"ours_tokens_per_s_{key}"] = statistics.median(one.tokens_per_s for one in ours)
                figures[f"failures_{key}"] = sum(one.failures for one in ours) / len(ours)
                figures[f"restart_tokens_per_s_{key}"] = length / (restarts * calm_step_s)
                figures[f"no_cache_tokens_per_s_{key}"] = (1 - fails) * length / sum(prefix_s[:length])
            figures[f"kept_{length}_at_{_COMPARED:g}"] = statistics.median(
                failing.tokens_per_s / calm.tokens_per_s for calm, failing in turns
            )
        model.disconnect()
    report.finish(figures)


def _generate(model: Any, inputs: Any, tokens: int, options: dict[str, Any]) -> tuple[torch.Tensor, float, float]:
    """(token ids, median seconds per step, seconds in all)."""
    times = TokenTimes()
    begun = time.perf_counter()
    ids = model.generate(
        **inputs, **options, streamer=times, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens
    )
    return ids, times.step_s, time.perf_counter() - begun


def _time_without_cache(model: Any, inputs: Any, tokens: int) -> list[float]:
    """Seconds that each step takes if the whole prefix is run, by the number of tokens so far."""
    embeddings = model.get_input_embeddings()(inputs["input_ids"])[:, :1]
    measured: list[tuple[int, float]] = []
    for length in sorted({1, 32, 128, tokens // 4, tokens // 2, tokens}):
        with model.inference_session(max_length=tokens) as session:
            repeats = []
            for _ in range(3):
                session.position = 0
                begun = time.perf_counter()
                session.step(embeddings.expand(1, length, -1))
                repeats.append(time.perf_counter() - begun)
        measured.append((length, statistics.median(repeats)))
    return [_between(measured, length) for length in range(1, tokens + 1)]


def _between(measured: list[tuple[int, float]], length: int) -> float:
    """Linear interpolation."""
    for (low, low_s), (high, high_s) in itertools.pairwise(measured):
        if low <= length <= high:
            return low_s + (high_s - low_s) * (length - low) / (high - low)
    return measured[-1][1]


if __name__ == "__main__":
    main()
