"""Decode speed of one user through two servers, beside the same model run locally by transformers.

SmolLM2-135M in fp32; every process computes with one thread; local and swarm alternate in one run, and
each figure is the median of its rounds.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from benchmarks.report import Report
from swarm.client import AutoDistributedModelForCausalLM
from swarm.commands.local_swarm import LocalPeer, LocalSwarm
from swarm.models import Checkpoint, open_checkpoint
from swarm.models.kv_size import kv_bytes_per_position
from swarm.models.local import load_whole_model

_MIB = 1024**2
_PROMPT = "The history of the sea is the history of"


class _StepTimes:
    """A streamer that notes when each token came; the time of a step is the median of the gaps."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def put(self, value: object) -> None:
        self._times.append(time.perf_counter())

    def end(self) -> None:
        pass

    @property
    def median_s(self) -> float:
        gaps = [later - earlier for earlier, later in zip(self._times[2:], self._times[3:], strict=False)]
        return statistics.median(gaps)


def main() -> None:
    """Run the benchmark."""
    report = Report.from_command_line(__doc__ or "")
    rounds, tokens = (3, 48) if report.quick else (9, 96)
    torch.set_num_threads(1)
    checkpoint = open_checkpoint("smollm2")
    inputs = checkpoint.tokenizer()(_PROMPT, return_tensors="pt")
    report.progress("starting two servers")
    with LocalSwarm() as swarm:
        servers = swarm.start_servers("smollm2", ["0:15", "15:30"], "--threads", "1")
        remote = AutoDistributedModelForCausalLM.from_pretrained("smollm2", initial_peers=swarm.initial_peers)
        local = load_whole_model(checkpoint)
        local_s, swarm_s, overheads_s = [], [], []
        for round_ in range(-1, rounds):  # the first round only warms up
            local_step_s, local_ids = _run(local, inputs, tokens, {})
            with remote.inference_session(max_length=256) as session:
                swarm_step_s, swarm_ids = _run(remote, inputs, tokens, {"session": session})
                overheads_s += [hop.total_s - hop.compute_s for hop in session.last_timings]
                memory = [_fixed_memory(server, checkpoint) for server in servers]
            if not torch.equal(local_ids, swarm_ids):
                raise SystemExit("the swarm's tokens differ from the local model's: a speed means nothing")
            speeds = f"local {1 / local_step_s:.1f}, swarm {1 / swarm_step_s:.1f} tokens/s"
            report.progress(f"round {round_ + 1} of {rounds}: {speeds}")
            if round_ >= 0:
                local_s.append(local_step_s)
                swarm_s.append(swarm_step_s)
        remote.disconnect()
    report.finish(
        {
            "ratio_to_local": statistics.median(mine / theirs for mine, theirs in zip(local_s, swarm_s, strict=True)),
            "swarm_tokens_per_s": 1 / statistics.median(swarm_s),
            "local_tokens_per_s": 1 / statistics.median(local_s),
            "overhead_per_hop_ms": 1e3 * statistics.median(overheads_s),
            "server_fixed_memory_mib": max(resident for resident, _, _ in memory),
            "server_fixed_memory_pss_mib": max(shared for _, shared, _ in memory),
            "server_processes": max(count for _, _, count in memory),
            "rounds": rounds,
            "tokens_per_round": tokens,
        }
    )


def _run(model: PreTrainedModel, inputs: Any, tokens: int, options: dict[str, Any]) -> tuple[float, torch.Tensor]:
    """(median seconds per decode step, token ids)."""
    times = _StepTimes()
    ids = model.generate(
        **inputs, **options, streamer=times, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens
    )
    return times.median_s, ids


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
