"""Long prompts: how fast they are, what they do to others, and what a prompt costs that many users share.

SmolLM2-135M in fp32 on two servers of 15 blocks, one computing thread each; the client computes with one thread.

- `prefill_over_local`: how many times as fast as transformers here (one thread) the first token after 512 comes, the
  two taking turns. Prompts travel in pieces, so that both servers are at work.
- `gap_p95_growth`: eight users decode, and somebody's prompt of 1,024 tokens comes. The 95th percentile of the gaps
  between their tokens while it is computed, over that of the seconds before and after it.
- `shared_prefix_compute`: 16 users ask different questions after the same 512 tokens, all at once. The time of the
  servers' processors until everybody has a first token, over that for one such prompt by itself; both several times, in
  turns, each time with other prompts: medians. (`…_by_timings`: the
  same as every step's timings say; their clock goes on while a server waits for a core that the users' threads have.)

`identical`: all answers are the local model's.
"""

from __future__ import annotations

import statistics
import threading
import time
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from benchmarks.report import Report
from benchmarks.users import PROMPTS, User, answer_together, exactly
from swarm.client import AutoDistributedModelForCausalLM
from swarm.commands.local_swarm import LocalSwarm
from swarm.models import open_checkpoint
from swarm.models.local import load_whole_model

_TEXT = "The sea is wide and the wind is cold, and nobody on the island remembers a summer like this one. "
_OTHER_TEXT = (
    "You are an assistant who answers in one sentence, names what it does not know, and never repeats itself. "
)
_LENGTH, _LONG_LENGTH = 512, 1024
_DECODING, _SHARING = 8, 16
_CALM_S = 3.0
_MOST_TOKENS = 400


@dataclass(frozen=True)
class Arena:
    """A swarm's model, and the same here."""

    report: Report
    remote: Any
    tokenizer: Any
    local: Any

    def tokens(self, text: str, length: int) -> torch.Tensor:
        """``[1, length]`` of `text`, again and again."""
        ids: torch.Tensor = self.tokenizer(text * (length // 8), return_tensors="pt").input_ids
        return ids[:, :length]

    def prompts(self) -> list[torch.Tensor]:
        """Short ones."""
        return [self.tokenizer(text, return_tensors="pt").input_ids for text in PROMPTS]

    def local_answer(self, prompt: torch.Tensor, tokens: int) -> list[int]:
        """What the swarm's answer must equal."""
        ids = self.local.generate(prompt, **exactly(tokens, self.local))
        return list(ids[0].tolist())


def main() -> None:
    """Run the benchmark."""
    report = Report.from_command_line(__doc__ or "")
    torch.set_num_threads(1)
    report.progress("starting two servers")
    with LocalSwarm() as swarm:
        peers = swarm.start_servers("smollm2", ["0:15", "15:30"], "--threads", "1")
        servers = [psutil.Process(peer.process.pid) for peer in peers]
        remote = AutoDistributedModelForCausalLM.from_pretrained("smollm2", initial_peers=swarm.initial_peers)
        arena = Arena(report, remote, remote.tokenizer(), load_whole_model(open_checkpoint("smollm2")))
        speed = _beside_local(arena, 3 if report.quick else 9)
        growth = _among_others(arena, 1 if report.quick else 4)
        sharing = _shared_prefix(arena, servers, 4 if report.quick else 16)
        remote.disconnect()
    identical = all(part.pop("identical") for part in (speed, sharing))
    report.finish({"identical": identical, **speed, **growth, **sharing})


def _beside_local(arena: Arena, rounds: int) -> dict[str, Any]:
    local_s, swarm_s, identical = [], [], True
    for round_ in range(-1, rounds):  # the first only warms up
        prompt = arena.tokens(f"{round_}. {_TEXT}", _LENGTH)  # one that the servers have not seen before
        mine, local_ids = _first_token_s(arena.local, prompt, {})
        with arena.remote.inference_session(max_length=_LENGTH + 8) as session:
            session.step(torch.zeros(1, 1, arena.remote.config.hidden_size))  # finds the way
            session.position = 0
            theirs, swarm_ids = _first_token_s(arena.remote, prompt, {"session": session})
        identical &= torch.equal(local_ids, swarm_ids)
        arena.report.progress(f"prefill, round {round_ + 1} of {rounds}: local {mine:.2f} s, swarm {theirs:.2f} s")
        if round_ >= 0:
            local_s.append(mine)
            swarm_s.append(theirs)
    return {
        "identical": identical,
        "prefill_over_local": statistics.median(mine / theirs for mine, theirs in zip(local_s, swarm_s, strict=True)),
        "prefill_tokens_per_s": _LENGTH / statistics.median(swarm_s),
        "local_prefill_tokens_per_s": _LENGTH / statistics.median(local_s),
    }


def _first_token_s(model: Any, prompt: torch.Tensor, options: dict[str, Any]) -> tuple[float, torch.Tensor]:
    begun = time.perf_counter()
    ids = model.generate(prompt, do_sample=False, max_new_tokens=1, **options)
    return time.perf_counter() - begun, ids


def _among_others(arena: Arena, rounds: int) -> dict[str, Any]:
    calm: list[float] = []
    disturbed: list[float] = []
    growths, prefills_s = [], []
    for round_ in range(rounds):
        prompt = arena.tokens(f"{round_}. {_TEXT}", _LONG_LENGTH)
        users = [User(one) for one in arena.prompts()[:_DECODING]]
        over = threading.Event()
        window: list[float] = []

        def meanwhile(
            prompt: torch.Tensor = prompt, over: threading.Event = over, window: list[float] = window
        ) -> None:
            time.sleep(2 * _CALM_S)  # their own prompts are done after the first half
            window.append(time.monotonic())
            _first_token_s(arena.remote, prompt, {})
            window.append(time.monotonic())
            time.sleep(_CALM_S)
            over.set()

        def stop(ids: torch.Tensor, _: object, over: threading.Event = over) -> torch.Tensor:
            return torch.full((ids.shape[0],), over.is_set())

        answer_together(arena.remote, users, _MOST_TOKENS, meanwhile=meanwhile, stopping_criteria=[stop])
        begin, end = window
        mine: tuple[list[float], list[float]] = ([], [])
        for user in users:
            for came, gap in zip(user.times.times[2:], user.times.gaps_s, strict=True):
                if came > begin - _CALM_S:
                    mine[came > begin and came - gap < end].append(gap)
        growths.append(_p95(mine[1]) / _p95(mine[0]))
        calm += mine[0]
        disturbed += mine[1]
        prefills_s.append(end - begin)
        arena.report.progress(
            f"a prompt among {_DECODING} users, round {round_ + 1} of {rounds}: it took {end - begin:.1f} s, "
            f"gaps p95 {1e3 * _p95(mine[0]):.0f} ms without, {1e3 * _p95(mine[1]):.0f} ms with it"
        )
    return {
        "gap_p95_growth": statistics.median(growths),
        "gap_p95_calm_ms": 1e3 * _p95(calm),
        "gap_p95_in_prefill_ms": 1e3 * _p95(disturbed),
        "gap_max_in_prefill_ms": 1e3 * max(disturbed),
        "prefill_among_others_s": statistics.median(prefills_s),
    }


def _shared_prefix(arena: Arena, servers: list[psutil.Process], compared: int) -> dict[str, Any]:
    def users(system: torch.Tensor) -> list[User]:
        return [User(torch.cat([system, question], dim=1)) for question in arena.prompts()[:_SHARING]]

    def prefill(some: list[User]) -> float:
        """Seconds of the servers' processors until everybody has a first token."""
        before = _processor_s(servers)
        answer_together(arena.remote, some, 1)
        return _processor_s(servers) - before

    ones_s, totals_s, noted = [], [], []
    for number in range(3 if arena.report.quick else 9):
        one = users(arena.tokens(f"Alone {number}. {_OTHER_TEXT}", _LENGTH))[:1]
        sharing = users(arena.tokens(f"Together {number}. {_OTHER_TEXT}", _LENGTH))
        ones_s.append(prefill(one))
        totals_s.append(prefill(sharing))
        noted.append(sum(user.prefill_compute_s for user in sharing) / one[0].prefill_compute_s)
        arena.report.progress(
            f"a shared prefix: {ones_s[-1]:.2f} s of processors for one user, {totals_s[-1]:.2f} s for {_SHARING}; "
            f"{noted[-1]:.2f} times as much as steps' timings say"
        )
    one_s, total_s = statistics.median(ones_s), statistics.median(totals_s)
    answer_together(arena.remote, sharing, 4)
    return {
        "identical": all(user.ids == arena.local_answer(user.prompt, 4) for user in sharing[:compared]),
        "shared_prefix_compute": total_s / one_s,
        "shared_prefix_compute_by_timings": statistics.median(noted),
        "shared_prefix_compute_s": total_s,
        "one_prefix_compute_s": one_s,
        "shared_prefix_compared": compared,
    }


def _processor_s(servers: list[psutil.Process]) -> float:
    return sum(sum(server.cpu_times()[:2]) for server in servers)


def _p95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20)[-1]


if __name__ == "__main__":
    main()
