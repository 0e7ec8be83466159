"""``swarm generate --explain``: the route, and where the time of a token went on it."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swarm.client.inference_session import InferenceSession
    from swarm.client.timing import HopTiming, StepTiming


class StepRecorder:
    """A streamer that notes, token by token, what the step took, and hands the tokens on to another streamer."""

    def __init__(self, session: InferenceSession, streamer: Any) -> None:
        self._session, self._streamer = session, streamer
        self._steps: list[StepTiming] = []
        self._times = [time.perf_counter()]

    def put(self, value: Any) -> None:
        """A token (or the prompt) has come."""
        if self._session.last_step.hops and (not self._steps or self._steps[-1] is not self._session.last_step):
            self._steps.append(self._session.last_step)
            self._times.append(time.perf_counter())
        self._streamer.put(value)

    def end(self) -> None:
        """That was all."""
        self._streamer.end()

    def figures(self) -> dict[str, Any]:
        """For scripts: the prompt's step, and the median of the later ones."""
        return {
            "prompt_s": self._times[1] - self._times[0] if self._steps else None,
            "token_s": self._token_s,
            "hops": [{**asdict(hop), "total_s": hop.total_s} for hop in self._typical_hops()],
        }

    def lines(self) -> list[str]:
        """For people: a table."""
        if not self._steps:
            return ["no step was taken"]
        hops, token_s = self._typical_hops(), self._token_s
        accounted_s = sum(hop.total_s for hop in hops)
        rows = [("blocks", "server", "compute", "experts", "waiting", "network", "reached")]
        rows += [(f"{hop.start}–{hop.end - 1}", _short(hop.peer_id), _ms(hop.compute_s - hop.experts_s),
                  _ms(hop.experts_s) if hop.experts_s else "", _ms(hop.queue_s),
                  _ms(hop.network_s), _way(index, hop)) for index, hop in enumerate(hops)]  # fmt: skip
        if token_s is not None:
            rows.append(
                ("", "this client", _ms(max(0.0, token_s - accounted_s)), "", "", "", "embedding, head, sampling")
            )
        columns = [column for column in range(7) if any(row[column] for row in rows[1:])]
        rows = [tuple(row[column] for column in columns) for row in rows]
        widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        last = (
            "the prompt alone" if token_s is None else f"a token: {_ms(token_s)} (median), {1 / token_s:.1f} per second"
        )
        codecs = sorted({hop.codec for hop in hops if hop.codec})
        lossy = [f"hidden states travel as {', '.join(codecs)}: not exactly"] if codecs else []
        return [
            f"prompt: {_ms(self._times[1] - self._times[0])}; {last}",
            *table,
            *lossy,
            *(f"replaced: {one.lost} ({one.reason}), {_ms(one.pause_s)}" for one in self._session.recoveries),
        ]

    @property
    def _token_s(self) -> float | None:
        gaps = [later - earlier for earlier, later in zip(self._times[1:], self._times[2:], strict=False)]
        return statistics.median(gaps) if gaps else None

    def _typical_hops(self) -> list[HopTiming]:
        """The last route's servers, each with the median of its times over the steps that ran on that route."""
        if not self._steps:
            return []
        last = self._steps[-1].hops
        same = [
            step.hops
            for step in self._steps[1:] or self._steps
            if [hop.peer_id for hop in step.hops] == [hop.peer_id for hop in last]
        ] or [last]
        return [_median([hops[index] for hops in same]) for index in range(len(last))]


def _median(hops: list[HopTiming]) -> HopTiming:
    return replace(
        hops[-1],
        queue_s=statistics.median(hop.queue_s for hop in hops),
        compute_s=statistics.median(hop.compute_s for hop in hops),
        experts_s=statistics.median(hop.experts_s for hop in hops),
        compute_share_s=statistics.median(hop.compute_share_s for hop in hops),
        network_s=statistics.median(hop.network_s for hop in hops),
    )


def _way(index: int, hop: HopTiming) -> str:
    if index == 0:
        return "from this client"
    return "through this client" if hop.relayed else "from the server before"


def _short(peer_id: str) -> str:
    return f"{peer_id[:8]}…{peer_id[-6:]}"


def _ms(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"
