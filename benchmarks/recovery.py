"""Kill, freeze and cut off servers while SmolLM2 answers through them: does a token change, and how long does it take?

Three spans of ten blocks, two servers each (three for the middle one), one thread each; an answer of 40 tokens after
a prompt of 256. Each kind of fault strikes ten times, at random moments, at random servers of the route; `identical`
counts the answers that equal the local model's. A pause is the largest gap between two tokens (for deaths in prefill:
what the first token took longer than without). Beside it is its floor, which no recovery without a standby can avoid
(in prefill: nothing): the time until the loss was noticed, and that of computing the context again on the lost blocks
(as long as that took the first time). Links are cut in the laboratory (tests/netlab), between hosts 1 ms apart; all
else is on loopback.
"""

from __future__ import annotations

import random
import signal
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from benchmarks.report import Report
from benchmarks.streamers import TokenTimes
from swarm.client import AutoDistributedModelForCausalLM
from swarm.client.background import BackgroundLoop
from swarm.client.inference_session import InferenceSession
from swarm.commands.local_swarm import LocalPeer, LocalSwarm
from swarm.models import open_checkpoint
from swarm.models.local import load_whole_model
from tests.netlab import Laboratory, Link, netlab_available

_SPANS = ("0:10", "0:10", "10:20", "10:20", "10:20", "20:30", "20:30")
_TEXT = "The sea is wide and the wind is cold, and nobody on the island remembers a summer like this one. "
_CONTEXT, _TOKENS = 256, 40
_STEP_S = 0.06
_STANDBY_WAIT_S = 60.0


@dataclass(frozen=True)
class Trial:
    """One answer with one fault in it, in seconds."""

    identical: bool
    pause_s: float
    floor_s: float


class Arena:
    """A swarm, a client, a local model to compare with, and faults."""

    def __init__(self, swarm: LocalSwarm, dice: random.Random, **options: Any) -> None:
        checkpoint = open_checkpoint("smollm2")
        tokenizer = checkpoint.tokenizer()
        self.swarm, self.dice = swarm, dice
        self.inputs = tokenizer(_TEXT * 20, return_tensors="pt", truncation=True, max_length=_CONTEXT)
        self.options = {"do_sample": False, "max_new_tokens": _TOKENS, "min_new_tokens": _TOKENS}
        self.expected = load_whole_model(checkpoint).generate(**self.inputs, **self.options)
        self.model = AutoDistributedModelForCausalLM.from_pretrained(
            "smollm2", initial_peers=swarm.initial_peers, **options
        )

    def restore(self) -> None:
        """Start anew what was killed or frozen (it lost its sessions, and its lease), and wait for it."""
        for peer in self.swarm.servers:
            if peer.process.poll() is None and _is_stopped(peer):
                peer.kill()
        alive = [peer.ready for peer in self.swarm.servers if peer.process.poll() is None and peer.ready]
        missing = list(_SPANS)
        for one in alive:
            missing.remove(f"{one['start']}:{one['end']}")
        self.swarm.start_servers("smollm2", missing, "--threads", "1", "--no-prompt-reuse")

    def victims(self, session: InferenceSession, count: int = 1) -> list[LocalPeer]:
        """So many neighbours on the route, at a random place."""
        first = self.dice.randint(0, len(session.route) - count)
        return [self.swarm.server(leg.peer_id) for leg in session.route[first : first + count]]

    def spare(self, victim: LocalPeer) -> LocalPeer:
        """Another living server of the same span."""
        span = (victim.ready or {})["start"]
        alive = [peer for peer in self.swarm.servers if peer.process.poll() is None and peer.ready]
        return next(peer for peer in alive if peer is not victim and (peer.ready or {})["start"] == span)

    def answer(self, strike: Callable[[InferenceSession], None], *, redundancy: int = 1) -> Trial:
        """Generate; `strike` at a random token and a random moment of its step."""
        struck: list[float] = []

        def strike_and_note() -> None:
            strike(session)
            struck.append(time.monotonic())

        with self.model.inference_session(max_length=_CONTEXT + _TOKENS) as session:
            if redundancy > 1:
                self._wait_for_standbys(session)
            timer = threading.Timer(self.dice.uniform(0, _STEP_S), strike_and_note)
            strike_after = 1 + self.dice.randint(4, _TOKENS - 12)
            prefill_s = 0.0

            def at_token(token: int) -> None:
                nonlocal prefill_s
                if token == 1:  # of the slowest server: what its blocks would cost anew
                    prefill_s = max(hop.compute_s for hop in session.last_timings)
                if token == strike_after:
                    timer.start()

            times = TokenTimes(at_token)
            ids = self.model.generate(**self.inputs, **self.options, session=session, streamer=times)
            timer.join()
        noticed = [one.noticed_at for one in session.recoveries if one.noticed_at is not None]
        noticed_s = max(0.0, min(noticed) - struck[0]) if noticed else 0.0
        floor_s = noticed_s + (prefill_s if redundancy == 1 else 0.0)
        return Trial(torch.equal(ids, self.expected), max(times.gaps_s), floor_s)

    def answer_after_a_death_in_prefill(self) -> Trial:
        """Kill a server of the route at a random moment of the prompt's step."""
        with self.model.inference_session(max_length=_CONTEXT + _TOKENS) as session:
            embeddings = self.model.get_input_embeddings()(self.inputs["input_ids"])
            session.step(embeddings)  # so that the route is known
            session.position = 0
            begun = time.monotonic()
            session.step(embeddings)  # and how long this takes
            calm_s = time.monotonic() - begun
            session.position = 0
            (victim,) = self.victims(session)
            killer = threading.Timer(self.dice.uniform(0, calm_s), victim.process.kill)
            times = TokenTimes()
            begun = time.monotonic()
            killer.start()
            ids = self.model.generate(**self.inputs, **self.options, session=session, streamer=times)
            killer.join()
        return Trial(torch.equal(ids, self.expected), max(0.0, times.times[1] - begun - calm_s), 0.0)

    def _wait_for_standbys(self, session: InferenceSession) -> None:
        session.step(self.model.get_input_embeddings()(self.inputs["input_ids"]))
        deadline = time.monotonic() + _STANDBY_WAIT_S
        while len(session.standbys) < len(session.route):
            if time.monotonic() > deadline:
                raise SystemExit("there were no standbys within a minute")
            time.sleep(0.1)
        session.position = 0


def main() -> None:
    """Run the benchmark."""
    report = Report.from_command_line(__doc__ or "")
    if (reason := netlab_available()) is not None:
        raise SystemExit(f"links cannot be cut here: {reason}")
    each = 2 if report.quick else 10
    torch.set_num_threads(1)
    trials: dict[str, list[Trial]] = {}
    with LocalSwarm() as swarm:
        report.progress(f"starting {len(_SPANS)} servers")
        swarm.start_servers("smollm2", _SPANS, "--threads", "1", "--no-prompt-reuse")
        arena = Arena(swarm, random.Random(1))
        for kind, run in _faults(arena).items():
            trials[kind] = _repeat(report, kind, run, each, arena.restore)
        arena.model.disconnect()
        twice = Arena(swarm, random.Random(2), redundancy=2)
        trials["standby"] = _repeat(
            report,
            "standby",
            lambda: twice.answer(lambda one: _kill(twice.victims(one)), redundancy=2),
            each,
            twice.restore,
        )
        twice.model.disconnect()
    trials["cut"] = _cut_links(report, each)
    counted = [trial for kind, some in trials.items() if kind != "standby" for trial in some]
    figures: dict[str, Any] = {
        "identical": sum(trial.identical for trial in counted),
        "faults": len(counted),
        "standby_identical": sum(trial.identical for trial in trials["standby"]),
        "standby_faults": len(trials["standby"]),
    }
    for kind, some in trials.items():
        figures[f"{kind}_pause_p50_s"] = statistics.median(trial.pause_s for trial in some)
        figures[f"{kind}_pause_max_s"] = max(trial.pause_s for trial in some)
        figures[f"{kind}_floor_p50_s"] = statistics.median(trial.floor_s for trial in some)
    report.finish(figures)


def _faults(arena: Arena) -> dict[str, Callable[[], Trial]]:
    def freeze(session: InferenceSession) -> None:
        (victim,) = arena.victims(session)
        victim.signal(signal.SIGSTOP)

    def kill_during_recovery(session: InferenceSession) -> None:
        victim = arena.swarm.server(session.route[1].peer_id)
        spare = arena.spare(victim)
        _kill([victim])
        time.sleep(arena.dice.uniform(0, 0.3))
        _kill([spare])

    return {
        "sigkill": lambda: arena.answer(lambda session: _kill(arena.victims(session))),
        "sigstop": lambda: arena.answer(freeze),
        "adjacent": lambda: arena.answer(lambda session: _kill(arena.victims(session, 2))),
        "prefill": arena.answer_after_a_death_in_prefill,
        "recovery": lambda: arena.answer(kill_during_recovery),
    }


def _repeat(
    report: Report, kind: str, run: Callable[[], Trial], times: int, restore: Callable[[], None] = lambda: None
) -> list[Trial]:
    trials = []
    for number in range(1, times + 1):
        trial = run()
        trials.append(trial)
        report.progress(
            f"{kind} {number} of {times}: {'identical' if trial.identical else 'DIFFERENT'}, "
            f"pause {trial.pause_s:.2f} s (floor {trial.floor_s:.2f} s)"
        )
        restore()
    return trials


def _cut_links(report: Report, times: int) -> list[Trial]:
    """Cut a random link of the route: from the client to a server, or from a server to the next."""
    names = [f"server{number}" for number in range(len(_SPANS))]
    with ExitStack() as stack:
        lab = stack.enter_context(Laboratory(["client", "bootstrap", *names], Link(delay_s=0.001)))
        swarm = stack.enter_context(LocalSwarm(lab.host("bootstrap")))
        report.progress("starting servers on hosts of their own")
        hosts: dict[str, str] = {}
        peers = [
            swarm.start_server(
                "smollm2", "--blocks", span, "--threads", "1", "--no-prompt-reuse", wait=False, host=lab.host(name)
            )
            for span, name in zip(_SPANS, names, strict=True)
        ]
        for peer, name in zip(peers, names, strict=True):
            peer.wait_until_ready()
            hosts[peer.peer_id] = name
        stack.enter_context(lab.inside("client"))
        BackgroundLoop.start_anew()
        arena = Arena(swarm, random.Random(3))
        cut: list[tuple[str, str]] = []

        def strike(session: InferenceSession) -> None:
            stops = ["client", *(hosts[leg.peer_id] for leg in session.route), "client"]
            place = arena.dice.randrange(len(stops) - 1)
            cut.append((stops[place], stops[place + 1]))
            lab.cut(*cut[-1])

        def run() -> Trial:
            try:
                return arena.answer(strike)
            finally:
                lab.heal(*cut.pop())

        trials = _repeat(report, "cut", run, times)
        arena.model.disconnect()
        return trials


def _kill(peers: Sequence[LocalPeer]) -> None:
    for peer in peers:
        peer.process.kill()
    for peer in peers:
        peer.process.wait()


def _is_stopped(peer: LocalPeer) -> bool:
    return bool(psutil.Process(peer.process.pid).status() == psutil.STATUS_STOPPED)


if __name__ == "__main__":
    main()
