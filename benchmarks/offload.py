"""How fast is a server whose blocks do not all fit in memory, beside what the disk allows, and beside `accelerate`?

SmolLM2-135M in fp32, all 30 blocks on one server that has memory for 10: `--memory` is the fixed costs of a server, its
KV cache, and 10 blocks. One user generates greedily; servers, client and peers compute with one thread each, take turns
in one run, and a figure is the median of its rounds. Tokens must be those of a server that holds all blocks, and of
transformers under accelerate.

The *bound* of a token is the longer of two times, both measured in every round. One is to read the bytes that a step
reads, from the same files, with nothing else to do, in the faster of two ways: preadv(2) into one buffer of huge pages,
or a map that is populated and dropped (madvise(2)). The other is a token of the same client on a server that holds all
blocks in memory. No server that reads these bytes for every token can be faster than the first, none that computes as
ours does faster than the second. `disk_bound_tokens_per_s` is the first alone. The files are in the page cache here, as
they are on a machine with memory that its owner did not give away.

*Cold* is the same with the files thrown out of the page cache before every step (posix_fadvise(2)), so that its bytes
come from the disk: in this process, without a network. Its bound likewise, but for the blocks of the window, which the
step before has brought: they are not counted.

`accelerate_tokens_per_s` is `accelerate.disk_offload`, which keeps nothing in memory;
`accelerate_dispatch_tokens_per_s` is `accelerate.dispatch_model` with as many blocks in memory as the server has, and
embedding, norm and head there as well.
"""

from __future__ import annotations

import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import disk_offload, dispatch_model

from benchmarks.report import Report
from benchmarks.streamers import TokenTimes
from swarm.client import AutoDistributedModelForCausalLM
from swarm.commands.local_swarm import LocalPeer, LocalSwarm
from swarm.models import Checkpoint, Span, load_span, open_checkpoint
from swarm.models.kv_size import kv_bytes_per_position
from swarm.models.local import load_whole_model
from swarm.models.weight_layout import huge_page_memory, lay_out_span
from swarm.server.plan import PROCESS_BYTES, WORKING_BYTES, MemoryPlan
from swarm.server.preparation import prepare
from swarm.server.settings import ServerSettings

_MIB = 1024**2
_BLOCKS_IN_MEMORY = 10
_KV_TOKENS = 2048
_POPULATE_READ = 22
_PROMPT = "The history of the sea is the history of"


class Files:
    """The blocks that a server reads at every step."""

    def __init__(self, home: Path) -> None:
        paths = sorted((home / "offload").glob("*.block"))
        self.size_bytes = sum(path.stat().st_size for path in paths)
        self._files = [path.open("rb", buffering=0) for path in paths]
        self._maps = [mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) for file in self._files]
        self._buffer = memoryview(huge_page_memory(max(map(len, self._maps))).numpy())

    def read(self) -> float:
        """Seconds to copy all of them into one buffer."""
        begun = time.perf_counter()
        for file in self._files:
            os.preadv(file.fileno(), [self._buffer], 0)
        return time.perf_counter() - begun

    def map(self) -> float:
        """Seconds to have all of them in memory, one after another."""
        begun = time.perf_counter()
        for map_ in self._maps:
            map_.madvise(_POPULATE_READ)
            map_.madvise(mmap.MADV_DONTNEED)
        return time.perf_counter() - begun

    def forget(self) -> None:
        """Throw them out of the page cache."""
        for file in self._files:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    """Run the benchmark."""
    report = Report.from_command_line(__doc__ or "")
    rounds, tokens, few = (3, 24, 4) if report.quick else (9, 48, 8)
    torch.set_num_threads(1)
    checkpoint = open_checkpoint("smollm2")
    plan = _plan(checkpoint)
    with tempfile.TemporaryDirectory(prefix="swarm-offload-") as directory:
        os.environ["SWARM_HOME"] = directory
        figures = _over_servers(report, checkpoint, plan, Path(directory), rounds, tokens, few)
        figures |= _cold(report, checkpoint, plan, Path(directory), 3 if report.quick else 8)
    report.finish(figures)


def _plan(checkpoint: Checkpoint) -> MemoryPlan:
    per_position = kv_bytes_per_position(checkpoint.config, torch.float32) * checkpoint.num_blocks
    kept = 2 * checkpoint.hidden_size * 4
    memory = PROCESS_BYTES + WORKING_BYTES + _BLOCKS_IN_MEMORY * 4 * checkpoint.block_elements(0)
    return prepare(
        ServerSettings(
            "smollm2",
            blocks=(0, checkpoint.num_blocks),
            memory_bytes=memory + _KV_TOKENS * (per_position + kept),
            kv_tokens=_KV_TOKENS,
            offload=True,
        )
    ).plan


def _over_servers(
    report: Report, checkpoint: Checkpoint, plan: MemoryPlan, home: Path, rounds: int, tokens: int, few: int
) -> dict[str, Any]:
    tokenizer = checkpoint.tokenizer()
    inputs = tokenizer(_PROMPT, return_tensors="pt")
    report.progress(f"starting a server with memory for {_BLOCKS_IN_MEMORY} blocks, and one with memory for all")
    options = ["--blocks", f"0:{checkpoint.num_blocks}", "--threads", "1", "--kv-tokens", str(_KV_TOKENS)]
    with LocalSwarm() as small, LocalSwarm() as large:
        begun = time.perf_counter()
        server = small.start_server("smollm2", *options, "--offload", "--memory", str(plan.memory_bytes))
        first_start_s = time.perf_counter() - begun
        large.start_server("smollm2", *options)
        files = Files(home)
        models = {
            name: AutoDistributedModelForCausalLM.from_pretrained("smollm2", initial_peers=swarm.initial_peers)
            for name, swarm in (("offloaded", small), ("resident", large))
        }
        report.progress("preparing accelerate")
        peers = _accelerated(checkpoint, plan, home / "accelerate")
        times: dict[str, list[float]] = {name: [] for name in (*models, *peers, "reading", "mapping")}
        identical, most = True, 0
        for round_ in range(-1, rounds):  # the first round only warms up
            ids: dict[str, list[int]] = {}
            measured: dict[str, float] = {"reading": files.read(), "mapping": files.map()}
            for name, model in models.items():
                measured[name], ids[name] = _generate(model, inputs, tokens)
            for name, model in peers.items():
                measured[name], ids[name] = _generate(model, inputs, few)
            most = max(most, _resident_bytes(server))
            identical &= all(mine == ids["resident"][: len(mine)] for mine in ids.values())
            speeds = ", ".join(f"{name} {1 / seconds:.2f}" for name, seconds in measured.items())
            report.progress(f"round {round_ + 1} of {rounds}, tokens/s: {speeds}")
            if round_ >= 0:
                for name, seconds in measured.items():
                    times[name].append(seconds)
        announced = server.ready["throughput"] if server.ready else 0.0
        for model in models.values():
            model.disconnect()
    bringing = [min(pair) for pair in zip(times["reading"], times["mapping"], strict=True)]
    bounds = [max(pair) for pair in zip(bringing, times["resident"], strict=True)]
    return {
        "identical": identical,
        "share_of_bound": _median_ratio(bounds, times["offloaded"]),
        "over_accelerate": _median_ratio(times["accelerate"], times["offloaded"]),
        "over_accelerate_dispatch": _median_ratio(times["accelerate_dispatch"], times["offloaded"]),
        "tokens_per_s": 1 / statistics.median(times["offloaded"]),
        "bound_tokens_per_s": 1 / statistics.median(bounds),
        "disk_bound_tokens_per_s": 1 / statistics.median(bringing),
        "resident_tokens_per_s": 1 / statistics.median(times["resident"]),
        "accelerate_tokens_per_s": 1 / statistics.median(times["accelerate"]),
        "accelerate_dispatch_tokens_per_s": 1 / statistics.median(times["accelerate_dispatch"]),
        "announced_steps_per_s": announced,
        "resident_mib": most / _MIB,
        "allowed_mib": plan.memory_bytes / _MIB,
        "read_mib_per_token": files.size_bytes / _MIB,
        "preadv_gb_per_s": files.size_bytes / statistics.median(times["reading"]) / 1e9,
        "mapped_gb_per_s": files.size_bytes / statistics.median(times["mapping"]) / 1e9,
        "resident_blocks": plan.num_blocks - plan.offloaded_blocks,
        "window_blocks": plan.window_blocks,
        "offloaded_blocks": plan.offloaded_blocks,
        "first_start_s": first_start_s,
        "rounds": rounds,
        "tokens_per_round": tokens,
    }


def _accelerated(checkpoint: Checkpoint, plan: MemoryPlan, directory: Path) -> dict[str, Any]:
    in_memory = plan.num_blocks - plan.offloaded_blocks + plan.window_blocks
    places = {name: "cpu" for name in ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")}
    for block in range(checkpoint.num_blocks):
        places[f"model.layers.{block}"] = "cpu" if block < in_memory else "disk"
    partly, wholly = load_whole_model(checkpoint), load_whole_model(checkpoint)
    dispatch_model(partly, places, main_device="cpu", offload_dir=directory / "partly")
    disk_offload(wholly, directory / "wholly", execution_device=torch.device("cpu"))
    return {"accelerate": wholly, "accelerate_dispatch": partly}


def _generate(model: Any, inputs: Any, tokens: int) -> tuple[float, list[int]]:
    """(median seconds per decode step, token ids)."""
    times = TokenTimes()
    ids = model.generate(**inputs, streamer=times, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens)
    return times.step_s, ids[0].tolist()


def _resident_bytes(server: LocalPeer) -> int:
    root = psutil.Process(server.process.pid)
    return sum(process.memory_info().rss for process in [root, *root.children(recursive=True)])


def _cold(report: Report, checkpoint: Checkpoint, plan: MemoryPlan, home: Path, steps: int) -> dict[str, float]:
    files = Files(home)
    spans = {
        count: load_span(
            checkpoint, 0, checkpoint.num_blocks, dtype=torch.float32, offloaded_blocks=count,
            window_blocks=plan.window_blocks,
        )
        for count in (0, plan.offloaded_blocks)
    }  # fmt: skip
    for span in spans.values():
        lay_out_span(span, checkpoint.hidden_size)
    to_read = 1 - plan.window_blocks / plan.offloaded_blocks
    reading, resident, offloaded = [], [], []
    for step in range(steps):
        reading.append(to_read * min(_timed(files.forget, files.read), _timed(files.forget, files.map)))
        resident.append(_timed(_step(spans[0], checkpoint)))
        run = _step(spans[plan.offloaded_blocks], checkpoint)
        run()
        offloaded.append(_timed(files.forget, run, files.forget, run) / 2)
        report.progress(
            f"cold step {step + 1} of {steps}, per s: reading {1 / reading[-1]:.2f}, offloaded {1 / offloaded[-1]:.2f}"
        )
    bounds = [max(pair) for pair in zip(reading, resident, strict=True)]
    return {
        "cold_share_of_bound": _median_ratio(bounds, offloaded),
        "cold_steps_per_s": 1 / statistics.median(offloaded),
        "cold_bound_steps_per_s": 1 / statistics.median(bounds),
        "cold_bandwidth_gb_per_s": to_read * files.size_bytes / statistics.median(reading) / 1e9,
    }


def _step(span: Span, checkpoint: Checkpoint) -> Callable[[], object]:
    cache, states = span.new_cache(), torch.ones(1, 1, checkpoint.hidden_size)
    return lambda: span.forward(states, cache)


def _timed(*works: Callable[[], object]) -> float:
    begun = time.perf_counter()
    for work in works:
        work()
    return time.perf_counter() - begun


def _median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    return statistics.median(one / other for one, other in zip(numerators, denominators, strict=True))


if __name__ == "__main__":
    main()
