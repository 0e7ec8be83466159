"""What a session is expected to spend on servers and on links, in seconds, by what it is going to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swarm.routing.snapshot import ClientLinks, HostedSpan

HOP_S = 0.005
"""What one way between two peers is reckoned to take as long as nobody has measured it."""
_UNKNOWN_BYTES_PER_S = 12.5e6
"""The same for their bandwidth: 100 Mbit/s."""
_BACKWARD_COMPUTE = 2.0
"""A backward pass computes about twice what the forward pass does."""
_SLOWEST_LINK_S = 1e9

Seconds = NDArray[np.float64]


@dataclass(frozen=True)
class Profile:
    """What a session still has to do."""

    steps: float = 1.0
    """Decode steps."""
    prompt_positions: float = 0.0
    """Of each sequence, to be run at once, or to be replayed."""
    batch: int = 1
    """Sequences."""
    position_bytes: float = 0.0
    """Of one hidden state on a link."""
    is_training: bool = False
    """Every prompt also goes back as gradients."""


ONE_STEP = Profile()
INTERACTIVE = Profile(steps=200, prompt_positions=100)
LONG_PROMPT = Profile(steps=100, prompt_positions=4000)
BATCH = Profile(steps=200, prompt_positions=100, batch=16)
TRAINING = Profile(steps=0, prompt_positions=512, batch=8, is_training=True)
PROFILES = {"interactive": INTERACTIVE, "long prompt": LONG_PROMPT, "batch": BATCH, "training": TRAINING}


def block_seconds(span: HostedSpan, profile: Profile) -> float:
    """What all that `profile` has to do takes for each block on a server, at its load."""
    prompt_s = span.block_prefill_s(profile.prompt_positions * profile.batch) if profile.prompt_positions else 0.0
    if profile.is_training:
        prompt_s *= 1 + _BACKWARD_COMPUTE
    return prompt_s + (profile.steps * span.block_step_s(span.sessions + profile.batch) if profile.steps else 0.0)


@dataclass(frozen=True)
class LinkSeconds:
    """What the links of a session take, for servers in a given order."""

    arriving: Seconds
    """``[n]``: from the client, with what choosing the server costs beyond its computation."""
    leaving: Seconds
    """``[n]``: to the client."""
    between: Seconds
    """``[n, n]``: from one server (first index) to another, chosen; 0 where they are the same."""
    doubts: Seconds
    """``[n]``: by how much `arriving` may be off, and `leaving` as well."""


def link_seconds(spans: Sequence[HostedSpan], links: ClientLinks, profile: Profile) -> LinkSeconds:
    """Latency for every passage and bandwidth for every byte, from measurements where there are any.

    Where both ends measured a link their mean counts. The way between two servers of which nobody says anything is
    guessed from how far they are from the client: half of what the triangle's two bounds have in their middle. No
    guess depends on what other servers there are, so one more server never makes a way look longer.

    The prompt's computations on successive servers overlap in practice (it travels in pieces); here they are added.
    """
    index = {span.peer_id: number for number, span in enumerate(spans)}
    client_rtts = np.array([links.rtts_s.get(span.peer_id, 2 * HOP_S) for span in spans], dtype=np.float64)
    doubts = np.array([links.doubts_s.get(span.peer_id, 0.0) for span in spans], dtype=np.float64)
    rtts = np.maximum(client_rtts[:, None], client_rtts[None, :])
    told: dict[tuple[int, int], list[float]] = {}
    for span in spans:
        for other, rtt_s in span.rtts_s.items():
            if other in index:
                one, two = index[span.peer_id], index[other]
                told.setdefault((min(one, two), max(one, two)), []).append(rtt_s)
    if told:
        ends = np.array(list(told))
        rtts[ends[:, 0], ends[:, 1]] = rtts[ends[:, 1], ends[:, 0]] = [sum(both) / len(both) for both in told.values()]
    directions = 2.0 if profile.is_training else 1.0
    passages = directions * (profile.steps + (1.0 if profile.prompt_positions else 0.0))
    size = directions * profile.batch * (profile.steps + profile.prompt_positions) * profile.position_bytes
    delays = np.array([span.delay_s for span in spans], dtype=np.float64)
    uploads = _rates([span.upload_bytes_per_s for span in spans])
    downloads = _rates([span.download_bytes_per_s for span in spans])
    upload, download = _rates([links.upload_bytes_per_s, links.download_bytes_per_s])
    arriving = passages * client_rtts / 2 + size / np.minimum(upload, downloads) + delays
    leaving = passages * client_rtts / 2 + size / np.minimum(uploads, download)
    between = rtts * (passages / 2)
    between += delays[None, :]
    if size:
        between += size / np.minimum(uploads[:, None], downloads[None, :])
    np.fill_diagonal(between, 0.0)
    return LinkSeconds(
        np.minimum(arriving, _SLOWEST_LINK_S),
        np.minimum(leaving, _SLOWEST_LINK_S),
        np.minimum(between, _SLOWEST_LINK_S, out=between),
        np.minimum(passages / 2 * doubts, _SLOWEST_LINK_S),
    )


def _rates(rates: Sequence[float | None]) -> Seconds:
    """Bytes per second; a rate of nothing is slow, not impossible."""
    return np.array([_UNKNOWN_BYTES_PER_S if rate is None else max(rate, 1.0) for rate in rates], dtype=np.float64)
