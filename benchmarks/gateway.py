"""Thirty-two people chat through the gateway for a minute, and servers die meanwhile.

The load comes from locust (``pip install 'swarm[benchmarks]'``), a process of its own; the gateway, a bootstrap peer
and five servers (three spans of SmolLM2, two of them twice) are others. Two servers are killed. Every answer is greedy
and is compared with the local model's.

Figures: ``requests`` that ended and ``errors`` among them; ``ttft_…_s``: from a question to the first piece of its
answer; ``gap_…_s``: between two pieces; ``pieces_per_s``: of all together; ``kills``; ``identical``: whether every
answer is the local model's.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.report import Report
from swarm.commands.local_swarm import LocalSwarm
from swarm.models import open_checkpoint
from swarm.models.local import load_whole_model
from swarm.transport.daemon import die_with_parent

try:
    from benchmarks.gateway_load import ANSWER_TOKENS, QUESTIONS
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: the load comes from locust. Install it with pip install 'swarm[benchmarks]'.") from None

_USERS = 32


def main() -> None:
    """Run the benchmark."""
    report = Report.from_command_line(__doc__ or "")
    duration_s = 20 if report.quick else 60
    report.progress("the local model's answers")
    expected = _local_answers()
    with tempfile.TemporaryDirectory(prefix="swarm-gateway-") as directory, LocalSwarm() as swarm:
        report.progress("starting five servers and the gateway")
        doomed = swarm.start_servers("smollm2", ["0:10", "10:20", "20:30", "0:10", "10:20"], "--threads", "1")[:2]
        gateway = swarm.start_gateway("smollm2", "--max-requests", str(_USERS))
        report.progress(f"{_USERS} people chat for {duration_s} s")
        log = Path(directory) / "load.jsonl"
        load = _start_load(str(gateway.ready["url"]) if gateway.ready else "", duration_s, log)
        begun = time.monotonic()
        for number, server in enumerate(doomed):
            time.sleep(max(0.0, begun + duration_s * (number + 1) / 3 - time.monotonic()))
            report.progress(f"killing {server.name}")
            server.kill()
        said, _ = load.communicate(timeout=duration_s + 180)
        if not log.exists():
            raise SystemExit(f"no request ended; the load generator said:\n{said}")
        records = [json.loads(line) for line in log.read_text().splitlines()]
    report.finish(_figures(records, expected, len(doomed)))


def _figures(records: list[dict[str, Any]], expected: dict[str, str], kills: int) -> dict[str, Any]:
    seconds = max(record["ended_at"] for record in records) - min(record["begun_at"] for record in records)
    answered = [record for record in records if record["error"] is None]
    first_s = [record["ttft_s"] for record in answered]
    gaps_s = [gap_s for record in answered for gap_s in record["gaps_s"]]
    return {
        "identical": all(record["text"] == expected[record["question"]] for record in answered),
        "requests": len(records),
        "errors": len(records) - len(answered),
        "error_messages": sorted({record["error"] for record in records if record["error"]})[:3],
        "kills": kills,
        "users": _USERS,
        "ttft_p50_s": statistics.median(first_s),
        "ttft_p95_s": _percentile(first_s, 0.95),
        "gap_p50_s": statistics.median(gaps_s),
        "gap_p95_s": _percentile(gaps_s, 0.95),
        "gap_max_s": max(gaps_s),
        "pieces_per_s": sum(len(record["gaps_s"]) + 1 for record in answered) / seconds,
    }


def _percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def _local_answers() -> dict[str, str]:
    checkpoint = open_checkpoint("smollm2")
    model, tokenizer = load_whole_model(checkpoint), checkpoint.tokenizer()
    answers = {}
    for question in QUESTIONS:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=ANSWER_TOKENS)
        answers[question] = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def _start_load(url: str, duration_s: float, log: Path) -> subprocess.Popen[str]:
    locustfile = Path(__file__).parent / "gateway_load.py"
    return subprocess.Popen(
        [
            sys.executable, "-m", "locust", "--headless", "--only-summary", "--locustfile", str(locustfile),
            "--host", url, "--users", str(_USERS), "--spawn-rate", str(_USERS),
            "--run-time", f"{duration_s:g}s", "--stop-timeout", "60s",
        ],
        env={**os.environ, "SWARM_LOAD_LOG": str(log)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=die_with_parent(os.getpid()),
    )  # fmt: skip


if __name__ == "__main__":
    main()
