"""Swarms that exist as announcements only, for the dashboard: of any size, with a past, served by the real application.

``python -m tests.synthetic_swarm --servers 1000 --models 5 --blocks 80`` prints its URL and serves until it is ended.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from swarm.dht import Announcement, ExpertAnnouncement, ModelListing, State
from swarm.dht.expert_announcement import bitmap_of
from swarm.health.app import health_app
from swarm.health.board import Board
from swarm.health.chronicle import Chronicle
from swarm.health.history import History
from swarm.health.observation import Observation, Probe
from swarm.http_server import listening_socket, serve

_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_NAMES = ("tidewater", "Lena M.", "umbrella-lab", "quiet rack", "hxr", "Studio Ostkreuz", "northwind", "0xfern", "kiwi")


def peer_id(number: int) -> str:
    """Of the right form, and always the same."""
    digits = random.Random(number).choices(_ALPHABET, k=44)
    return f"12D3KooW{''.join(digits)}"


def digest(name: str) -> str:
    """As models are named."""
    return hashlib.sha256(name.encode()).hexdigest()


def span(number: int, model: str, blocks: int, start: int, end: int, **changes: object) -> Announcement:
    """What one server says."""
    fields = {
        "peer_id": peer_id(number), "model": digest(model), "model_name": model, "state": State.ONLINE,
        "num_blocks": blocks, "start": start, "end": end, "dtype": "bfloat16", "throughput": 10 + number % 37,
        "free_kv_tokens": 65_536 - 512 * (number % 100), "sessions": number % 4, "version": "0.1.0",
        "addresses": (f"/ip4/203.0.113.{number % 250}/tcp/{31000 + number % 999}/p2p/{peer_id(number)}",),
        "issued_at": time.time(),
    }  # fmt: skip
    return Announcement.model_validate({**fields, **changes})


def hosts_of(number: int, model: str, experts: dict[int, Sequence[int]], **changes: object) -> ExpertAnnouncement:
    """What one server of experts says."""
    fields = {
        "peer_id": peer_id(number), "model": digest(model), "model_name": model, "state": State.ONLINE,
        "bitmaps": {block: bitmap_of(those) for block, those in experts.items()}, "dtype": "bfloat16",
        "rows_per_s": 900.0 + number, "version": "0.1.0", "issued_at": time.time(),
    }  # fmt: skip
    return ExpertAnnouncement.model_validate({**fields, **changes})


def crowd(servers: int, models: int, blocks: int) -> list[Announcement]:
    """`servers` of each model, each with an eighth of it, some with more in memory, everything covered."""
    length = max(1, blocks // 8)
    return [
        span(
            model * servers + number,
            f"volunteers/model-{model}",
            blocks,
            start := (number * length) % (blocks - length + 1)
            if number >= 8
            else min(number * length, blocks - length),
            start + length,
            loaded=(max(0, start - length), start + length) if number % 5 == 4 and start > 0 else None,
            public_name=_NAMES[number % len(_NAMES)] if number % 3 == 0 else "",
        )
        for model in range(models)
        for number in range(servers)
    ]


def look(
    announcements: Sequence[Announcement | ExpertAnnouncement], at: float, dead: Sequence[int] = ()
) -> Observation:
    """What is seen of them: all answer, but for `dead`, whose ports refuse."""
    renewed = [one.model_copy(update={"issued_at": at}) for one in announcements]
    gone = {peer_id(number) for number in dead}
    alive = [one for one in renewed if one.peer_id not in gone]
    silent = [one.model_copy(update={"issued_at": 0.0}) for one in announcements if one.peer_id in gone]
    probes = {
        one.peer_id: Probe(at, at, 0.004 + int(one.issued_at * 1e3) % 7 * 0.01 + hash(one.peer_id) % 90 / 1e3)
        for one in alive
    }
    probes |= {one.peer_id: Probe(at, at, None, refused=True) for one in silent}
    seen = [*alive, *silent]
    return Observation(
        at,
        tuple(one for one in seen if isinstance(one, Announcement)),
        tuple(one for one in seen if isinstance(one, ExpertAnnouncement)),
        probes=probes,
    )


class SyntheticSwarm:
    """Looks at announcements, again and again, in place of a watch."""

    def __init__(self, chronicle: Chronicle, announcements: Sequence[Announcement | ExpertAnnouncement]) -> None:
        self._chronicle, self.announcements = chronicle, list(announcements)
        self.listings: tuple[ModelListing, ...] = ()
        self.dead: list[int] = []

    def look(self, at: float) -> None:
        """Once."""
        seen = look(self.announcements, at, self.dead)
        self._chronicle.take_in(Observation(seen.at, seen.spans, seen.experts, self.listings, seen.probes))


async def _serve(options: argparse.Namespace) -> None:
    board, directory = Board(), tempfile.TemporaryDirectory()
    history = History(Path(directory.name) / "history.sqlite")
    swarm = SyntheticSwarm(Chronicle(board, history, {}), crowd(options.servers, options.models, options.blocks))
    stop = threading.Event()

    def keep_looking() -> None:
        while not stop.is_set():
            swarm.look(time.time())
            stop.wait(2.0)

    looking = threading.Thread(target=keep_looking)
    looking.start()
    listening = listening_socket("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
    await serve(health_app(board, history), listening, lambda: print(json.dumps({"url": url}), flush=True), board.close)
    stop.set()
    await asyncio.to_thread(looking.join)
    history.close()
    directory.cleanup()


def main() -> None:
    """Serve until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("servers", 1000), ("models", 5), ("blocks", 80)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asyncio.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
