"""A swarm of real servers that finds its places: six join, three die, two come; a client talks through all of it.

SmolLM2-135M in fp32 on loopback. Servers of ten blocks are started with ``--blocks auto``, one computing thread each,
and look every five seconds (give or take a half) whether to move.

1. Six join an empty swarm at once: until every block is served twice (`covered_s`).
2. Three are killed, among them both that serve the first block, while a client has a long answer written: until every
   block is served again (`coverage_returned_s`; the leases of the dead run out first).
3. Two come with two threads, for the first blocks: until nobody serves alone what others could (`settled_s`). New
   sessions then go over the newcomers, where both ways exist, as `newcomers_share` says.
4. For five minutes (`--quick`: 30 s) nobody may move (`moves_in_calm`).

`identical`: the answer is the local model's. `gap_p50_s`, `gap_max_s`: what three tokens took the client, most and
worst, all of this included. `move_growth_mib`: by how much the memory of a server that moved was larger at its worst
than before (weights that it keeps are not read again, those that it leaves are dropped first).
"""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import torch

from benchmarks.report import Report
from swarm.client import AutoDistributedModelForCausalLM, ClientSettings, Network
from swarm.commands.local_swarm import LocalPeer, LocalSwarm
from swarm.dht import Announcement, State
from swarm.models import open_checkpoint
from swarm.models.local import load_whole_model
from tests.live_swarm import Talker, moves, redundancy, seen_until, until

_BLOCKS, _EACH = 30, 10
_AUTO = [
    "--num-blocks", str(_EACH), "--threads", "1", "--kv-tokens", "16384", "--drain-timeout", "5",
    "--rebalance-every", "5", "--claim-wait", "2", "--settle-wait", "3",
]  # fmt: skip
_CALM_S, _QUICK_CALM_S = 300.0, 30.0
_SESSIONS = 12
_PROMPT = "The history of the sea is"
_MEBIBYTE = 1024**2


class Memory(threading.Thread):
    """Samples what processes have resident, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen: dict[int, list[int]] = {}
        self._pids: list[int] = []
        self.start()

    def watch(self, peers: Sequence[LocalPeer]) -> None:
        """From now on, and nobody else."""
        self._pids = [peer.process.pid for peer in peers]
        self.seen = {pid: [] for pid in self._pids}

    def run(self) -> None:
        """Until the process ends."""
        while True:
            for pid in self._pids:
                try:
                    self.seen[pid].append(psutil.Process(pid).memory_info().rss)
                except (psutil.Error, KeyError):
                    continue
            time.sleep(0.1)


class Course:
    """What happened so far, and when."""

    def __init__(self, swarm: LocalSwarm, network: Network, report: Report) -> None:
        self.swarm, self.network, self.report = swarm, network, report
        self.figures: dict[str, Any] = {}
        self.memory = Memory()

    async def until(self, figure: str, done: Callable[[Sequence[Announcement]], bool]) -> Sequence[Announcement]:
        """Wait for what the directory is to show, and note how long that took."""
        begun = time.monotonic()
        servers = await seen_until(self.network, "smollm2", done, within_s=180)
        self.figures[figure] = time.monotonic() - begun
        spans = ", ".join(sorted(f"{one.start}:{one.end}" for one in servers if one.state is State.ONLINE))
        self.report.progress(f"{figure}: {self.figures[figure]:.1f} s; {moves(servers)} moves; spans {spans}")
        return servers

    async def start(self, count: int, *arguments: str) -> list[LocalPeer]:
        """Start servers at once; they are ready when this returns."""
        peers = [self.swarm.start_server("smollm2", *arguments, wait=False) for _ in range(count)]
        for peer in peers:
            await asyncio.to_thread(peer.wait_until_ready)
        return peers


async def run(swarm: LocalSwarm, report: Report) -> dict[str, Any]:
    """All of it."""
    network = await Network.join(ClientSettings(initial_peers=tuple(swarm.initial_peers)))
    course = Course(swarm, network, report)
    report.progress("six servers join an empty swarm")
    await course.start(6, *_AUTO)
    servers = await course.until("covered_s", lambda seen: redundancy(seen, _BLOCKS) == [2] * _BLOCKS)
    course.figures["moves_to_cover"] = moves(servers)

    model = await asyncio.to_thread(
        AutoDistributedModelForCausalLM.from_pretrained, "smollm2", initial_peers=swarm.initial_peers
    )
    talker = Talker(model, _prompt_ids())
    await asyncio.to_thread(until, lambda: len(talker.gaps_s) > 5 or talker.error is not None)
    report.progress("three are killed")
    first = [one.peer_id for one in servers if one.hosts(0)]
    killed = [*first, *(one.peer_id for one in servers if one.peer_id not in first)][:3]
    survivors = [peer for peer in swarm.servers if peer.peer_id not in killed]
    course.memory.watch(survivors)
    for peer_id in killed:
        swarm.server(peer_id).kill()
    servers = await course.until(
        "coverage_returned_s", lambda seen: len(seen) == 3 and redundancy(seen, _BLOCKS) == [1] * _BLOCKS
    )
    course.figures["moves_to_cover_again"] = moves(servers)
    growths = [(max(seen) - seen[0]) / _MEBIBYTE for seen in course.memory.seen.values() if seen]
    course.figures["move_growth_mib"] = max(growths)

    report.progress("two come to the first blocks")
    newcomers = await course.start(2, "--blocks", f"0:{_EACH}", "--threads", "2")
    servers = await course.until(
        "settled_s",
        lambda seen: len(seen) == 5 and sorted(redundancy(seen, _BLOCKS))[_EACH:] == [2] * (_BLOCKS - _EACH),
    )
    settled = moves(servers)
    course.figures["moves_in_all"] = settled
    course.figures["newcomers_share"] = await asyncio.to_thread(_share, model, [one.peer_id for one in newcomers])

    calm_s = _QUICK_CALM_S if report.quick else _CALM_S
    report.progress(f"{calm_s:.0f} s of calm")
    watched_until = time.monotonic() + calm_s
    while time.monotonic() < watched_until:
        servers = await seen_until(network, "smollm2", lambda seen: len(seen) == 5, within_s=10)
        await asyncio.sleep(1)
    course.figures["moves_in_calm"], course.figures["calm_s"] = moves(servers) - settled, calm_s

    ids = await asyncio.to_thread(talker.answer)
    await asyncio.to_thread(model.disconnect)
    await network.leave()
    course.figures |= {"gap_p50_s": statistics.median(talker.gaps_s), "gap_max_s": max(talker.gaps_s)}
    return {"identical": _is_local(ids, report), "tokens": ids.shape[1], **course.figures}


def _share(model: Any, newcomers: Sequence[str]) -> float:
    """Of the blocks that newcomers serve, how many sessions of some that begin now are served by them."""
    counts = []
    for _ in range(_SESSIONS):
        with model.inference_session(max_length=32) as session:
            model.generate(torch.tensor([[5, 9, 33]]), session=session, do_sample=False, max_new_tokens=2)
            counts += [leg.peer_id in newcomers for leg in session.route if leg.start < _EACH]
    return statistics.mean(counts)


def _is_local(ids: torch.Tensor, report: Report) -> bool:
    report.progress("comparing with the local model")
    prompt = torch.tensor([_prompt_ids()])
    count = ids.shape[1] - prompt.shape[1]
    whole = load_whole_model(open_checkpoint("smollm2"))
    expected = whole.generate(prompt, do_sample=False, max_new_tokens=count, min_new_tokens=count)
    return bool(torch.equal(ids, expected))


def _prompt_ids() -> list[int]:
    """The token ids of the question."""
    ids: list[int] = open_checkpoint("smollm2").tokenizer()(_PROMPT).input_ids
    return ids


def main() -> None:
    """Run the benchmark."""
    report = Report.from_command_line(__doc__ or "")
    torch.set_num_threads(1)
    with LocalSwarm() as swarm:
        report.finish(asyncio.run(run(swarm, report)))


if __name__ == "__main__":
    main()
