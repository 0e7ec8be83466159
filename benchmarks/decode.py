"""Decode speed of one user through two servers, beside the same model run locally by transformers.

SmolLM2-135M in fp32; every process computes with one thread; all take turns in one run, and each figure is the median
of its rounds. Beside the two stand: the same spans and the same shell in this process alone, without a network
(benchmarks/one_process.py; `overhead_vs_one_process` is what the swarm takes longer for a token), and the same two
servers with quantized weights (`int8_over_fp32`: tokens/s of theirs over those of fp32).
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.one_process import OneProcess
from benchmarks.report import Report
from benchmarks.streamers import TokenTimes
from benchmarks.users import exactly
from swarm.client import AutoDistributedModelForCausalLM
from swarm.commands.local_swarm import LocalPeer, LocalSwarm
from swarm.models import Checkpoint, open_checkpoint
from swarm.models.kv_size import kv_bytes_per_position
from swarm.models.local import load_whole_model
from swarm.models.quantization import SCHEMES

_MIB = 1024**2
_PROMPT = "The history of the sea is the history of"
_SPANS = ((0, 15), (15, 30))


def main() -> None:
    """Run the benchmark."""
    report = Report.from_command_line(__doc__ or "")
    rounds, tokens = (3, 48) if report.quick else (9, 96)
    torch.set_num_threads(1)
    checkpoint = open_checkpoint("smollm2")
    inputs = checkpoint.tokenizer()(_PROMPT, return_tensors="pt")
    schemes = [None, *(scheme for scheme in SCHEMES if scheme in ("int8", "int4"))]
    with LocalSwarm() as swarm:
        servers: dict[str | None, list[LocalPeer]] = {}
        models: dict[str | None, Any] = {}
        for scheme in schemes:
            report.progress(f"starting two servers, {scheme or 'fp32'}")
            options = ("--quantize", scheme) if scheme else ()
            spans = [f"{start}:{end}" for start, end in _SPANS]
            servers[scheme] = swarm.start_servers("smollm2", spans, "--threads", "1", *options)
            models[scheme] = AutoDistributedModelForCausalLM.from_pretrained(
                "smollm2", initial_peers=swarm.initial_peers, quantization=scheme
            )
        local, one_process = load_whole_model(checkpoint), OneProcess(checkpoint, _SPANS)
        steps_s: dict[str | None, list[float]] = {name: [] for name in ("local", "one process", *schemes)}
        overheads_s = []
        for round_ in range(-1, rounds):  # the first round only warms up
            found: dict[str | None, float] = {}
            found["local"], expected = _run(local, inputs, tokens, {})
            found["one process"], ids = _run(one_process, inputs, tokens, {})
            identical = torch.equal(ids, expected)
            for scheme, model in models.items():
                with model.inference_session(max_length=256) as session:
                    found[scheme], ids = _run(model, inputs, tokens, {"session": session})
                    if scheme is None:
                        identical &= torch.equal(ids, expected)
                        overheads_s += [hop.total_s - hop.compute_s for hop in session.last_timings]
                        memory = [_fixed_memory(server, checkpoint) for server in servers[None]]
            if not identical:
                raise SystemExit("the swarm's tokens differ from the local model's: a speed means nothing")
            speeds = ", ".join(f"{name or 'swarm'} {1 / step_s:.1f}" for name, step_s in found.items())
            report.progress(f"round {round_ + 1} of {rounds}: {speeds} tokens/s")
            if round_ >= 0:
                for name, step_s in found.items():
                    steps_s[name].append(step_s)
        for model in models.values():
            model.disconnect()

    def times_as_fast(name: str | None, beside: str | None) -> float:
        return statistics.median(
            theirs / mine for mine, theirs in zip(steps_s[name], steps_s[beside], strict=True)
        )  # fmt: skip

    report.finish(
        {
            "ratio_to_local": times_as_fast(None, "local"),
            "swarm_tokens_per_s": 1 / statistics.median(steps_s[None]),
            "local_tokens_per_s": 1 / statistics.median(steps_s["local"]),
            "one_process_tokens_per_s": 1 / statistics.median(steps_s["one process"]),
            "overhead_vs_one_process": times_as_fast("one process", None) - 1,
            **{f"{scheme}_over_fp32": times_as_fast(scheme, None) for scheme in schemes if scheme},
            **{f"swarm_tokens_per_s_{scheme}": 1 / statistics.median(steps_s[scheme]) for scheme in schemes if scheme},
            "overhead_per_hop_ms": 1e3 * statistics.median(overheads_s),
            "server_fixed_memory_mib": max(resident for resident, _, _ in memory),
            "server_fixed_memory_pss_mib": max(shared for _, shared, _ in memory),
            "server_processes": max(count for _, _, count in memory),
            "rounds": rounds,
            "tokens_per_round": tokens,
        }
    )


def _run(model: Any, inputs: Any, tokens: int, options: dict[str, Any]) -> tuple[float, torch.Tensor]:
    """(median seconds per decode step, token ids)."""
    times = TokenTimes()
    ids = model.generate(**inputs, **options, **exactly(tokens, model), streamer=times)
    return times.step_s, ids


def _fixed_memory(server: LocalPeer, checkpoint: Checkpoint) -> tuple[float, float, int]:
    """(resident MiB, proportional MiB, processes) of a server, without its weights and its KV cache.

    Proportional memory (PSS) counts the pages of libraries that several processes share by halves, thirds, ….
    """
    assert server.ready is not None
    blocks = range(server.ready["start"], server.ready["end"])
    dtype = checkpoint.default_dtype
    weights = sum(checkpoint.block_elements(block) * dtype.itemsize for block in blocks)
    pool = server.ready["free_kv_tokens"] * kv_bytes_per_position(checkpoint.config, dtype) * len(blocks)
    root = psutil.Process(server.process.pid)
    processes = [root, *root.children(recursive=True)]
    sizes = [process.memory_full_info() for process in processes]
    held = weights + _resident_in_areas_of(root.pid, pool)
    return (
        (sum(one.rss for one in sizes) - held) / _MIB,
        (sum(one.pss for one in sizes) - held) / _MIB,
        len(processes),
    )


def _resident_in_areas_of(pid: int, size_bytes: int) -> int:
    """Bytes that are resident of the areas of memory at least so large: the KV cache is allotted as one."""
    resident, counts = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if line.startswith("Size:"):
            counts = int(line.split()[1]) * 1024 >= size_bytes
        elif line.startswith("Rss:") and counts:
            resident += int(line.split()[1]) * 1024
    return resident


if __name__ == "__main__":
    main()
