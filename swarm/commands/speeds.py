"""How speeds are told to people."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from swarm.dht import Announcement
    from swarm.server.neighbours import NetworkSpeed


def compute_sentence(announcement: Announcement) -> str:
    """What a server's owner reads of its computing when it comes online."""
    decode = announcement.decode_steps_per_s
    users = [f"{rate:.0f} for {count} users at once" for count, rate in sorted(decode.items()) if count > 1]
    prefill = announcement.prefill_tokens_per_s
    prompts = f"; it reads prompts at {prefill:.0f} tokens/s" if prefill is not None else ""
    one = f"{announcement.throughput:.0f} tokens/s for one user"
    return f"Its blocks let through {', '.join([one, *users])}{prompts}."


def network_sentence(speed: NetworkSpeed) -> str:
    """What a server's owner reads of its network; empty if nothing was measured."""
    if not speed.rtts_s:
        return ""
    count = len(speed.rtts_s)
    others = "1 other server" if count == 1 else f"{count} other servers"
    rates = [
        f"{verb} {megabits(rate)}"
        for verb, rate in (("sends", speed.upload_bytes_per_s), ("receives", speed.download_bytes_per_s))
        if rate is not None
    ]
    nearest = f"the nearest is {milliseconds(min(speed.rtts_s.values()))} away and back"
    return f"Network, measured to {others}: {', '.join([nearest, *rates])}."


def milliseconds(seconds: float) -> str:
    """``0.0123`` → ``"12 ms"``."""
    return f"{seconds * 1000:.{1 if seconds < 0.01 else 0}f} ms"


def megabits(bytes_per_s: float) -> str:
    """Bytes per second as providers advertise a line: ``"25.3 Mbit/s"``."""
    return f"{bytes_per_s * 8 / 1e6:.{1 if bytes_per_s < 12.5e6 else 0}f} Mbit/s"
