"""``swarm status MODEL``: a table of blocks and servers."""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import TYPE_CHECKING

from swarm.commands.output import Output
from swarm.commands.speeds import megabits, milliseconds

if TYPE_CHECKING:
    from rich.table import Table

    from swarm.dht import Announcement

_BATCHES = (4, 16)
"""The numbers of sessions for which speeds are shown, besides one."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``swarm status``."""
    parser.add_argument("model", help="alias (smollm2), directory, .gguf file, or Hugging Face Hub id")
    parser.add_argument("--initial-peers", nargs="+", required=True, metavar="ADDRESS", help="peers to join through")


def run(options: argparse.Namespace, output: Output) -> int:
    """Print the table; the code is 0 if every block has a server that is online, else 3."""
    from swarm.models import open_checkpoint

    checkpoint = open_checkpoint(options.model)
    servers = asyncio.run(_look_up(checkpoint.model_digest, options.initial_peers))
    servers.sort(key=lambda server: (server.start, server.end, server.peer_id))
    redundancy = [
        sum(server.hosts(block) for server in servers if server.state == "online")
        for block in range(checkpoint.num_blocks)
    ]
    _print_table(options.model, checkpoint.num_blocks, servers, redundancy, output)
    output.event(
        model=checkpoint.model_digest,
        num_blocks=checkpoint.num_blocks,
        complete=min(redundancy) > 0,
        redundancy=redundancy,
        servers=[server.model_dump(mode="json") for server in servers],
    )
    return 0 if min(redundancy) > 0 else 3


async def _look_up(model_digest: str, initial_peers: list[str]) -> list[Announcement]:
    from swarm.client import ClientSettings, Network

    network = await Network.join(ClientSettings(initial_peers=tuple(initial_peers)))
    try:
        return await network.servers(model_digest)
    finally:
        await network.leave()


def _print_table(
    model: str, num_blocks: int, servers: list[Announcement], redundancy: list[int], output: Output
) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{model}: {num_blocks} blocks", title_justify="left")
    for name in ("server", "blocks", "", "state", "steps/s", "free KV", "sessions", "precision", "seen"):
        table.add_column(name, justify="right" if name in ("steps/s", "free KV", "sessions", "seen") else "left")
    for server in servers:
        table.add_row(
            _name(server),
            f"{server.start}–{server.end - 1}",
            _bar(server.start, server.end, num_blocks),
            server.state.value,
            f"{server.throughput:.1f}",
            f"{server.free_kv_tokens:,}",
            str(server.sessions),
            server.precision,
            f"{max(0.0, time.time() - server.issued_at):.0f} s ago",
        )
    console = Console(stderr=output.json, width=None)
    if servers:
        console.print(table)
    if any(server.decode_steps_per_s for server in servers):
        console.print(_speed_table(servers))
    missing = [block for block, count in enumerate(redundancy) if count == 0]
    if missing:
        output.say(f"INCOMPLETE: no server is online for {len(missing)} of {num_blocks} blocks: {_spans(missing)}")
    else:
        output.say(f"Complete: every block has {min(redundancy)} or more servers.")


def _speed_table(servers: list[Announcement]) -> Table:
    """How fast each server is by its own measurement, one row each; nothing where it does not say."""
    from rich.table import Table

    table = Table(title="As each server measured itself: steps/s by sessions at once, network", title_justify="left")
    table.add_column("server")
    for name in ("1 session", *(f"{batch} sessions" for batch in _BATCHES), "prompt tokens/s"):
        table.add_column(name, justify="right")
    for name in ("nearest", "sends", "receives"):
        table.add_column(name, justify="right")
    for server in servers:
        decode = server.decode_steps_per_s
        table.add_row(
            _name(server),
            f"{server.throughput:.1f}",
            *(f"{decode[batch]:.1f}" if batch in decode else "" for batch in _BATCHES),
            f"{server.prefill_tokens_per_s:.0f}" if server.prefill_tokens_per_s is not None else "",
            milliseconds(min(server.rtts_s.values())) if server.rtts_s else "",
            megabits(server.upload_bytes_per_s) if server.upload_bytes_per_s is not None else "",
            megabits(server.download_bytes_per_s) if server.download_bytes_per_s is not None else "",
        )
    return table


def _name(server: Announcement) -> str:
    return server.public_name or f"{server.peer_id[:8]}…{server.peer_id[-4:]}"


def _bar(start: int, end: int, num_blocks: int, width: int = 24) -> str:
    """A picture of a span within the model."""
    return "".join(
        "█" if start < (cell + 1) * num_blocks / width and end > cell * num_blocks / width else "·"
        for cell in range(width)
    )


def _spans(blocks: list[int]) -> str:
    firsts = [block for block in blocks if block - 1 not in blocks]
    lasts = [block for block in blocks if block + 1 not in blocks]
    return ", ".join(
        str(first) if first == last else f"{first}–{last}" for first, last in zip(firsts, lasts, strict=True)
    )
