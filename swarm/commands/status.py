"""``swarm status MODEL``: a table of blocks and servers, once or for as long as one watches."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from swarm.commands.output import Output

if TYPE_CHECKING:
    from rich.console import Console

    from swarm.client import Network
    from swarm.dht import Announcement, ExpertAnnouncement
    from swarm.models import Checkpoint

_SHOWN_CHANGES = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``swarm status``."""
    parser.add_argument("model", help="alias (smollm2), directory, .gguf file, or Hugging Face Hub id")
    parser.add_argument("--initial-peers", nargs="+", required=True, metavar="ADDRESS", help="peers to join through")
    parser.add_argument(
        "--watch", action="store_true", help="go on looking: coverage, redundancy and moves, live, until Ctrl-C"
    )
    parser.add_argument("--every", type=float, default=2.0, metavar="S", help="with --watch: seconds between looks (2)")


def run(options: argparse.Namespace, output: Output) -> int:
    """Print the table; the code is 0 if every block has a server that is online, else 3. Watching ends with 0."""
    from swarm.models import open_checkpoint

    if not options.every >= 0.1:
        raise ValueError("--every must be at least 0.1 seconds")
    checkpoint = open_checkpoint(options.model)
    if options.watch:
        try:
            asyncio.run(_watch(options, checkpoint.model_digest, checkpoint.num_blocks, output))
        except KeyboardInterrupt:
            return 0
    servers, hosts = asyncio.run(_look_once(checkpoint.model_digest, options.initial_peers))
    return _show_once(options.model, checkpoint, servers, hosts, output)


async def _look_once(
    model_digest: str, initial_peers: Sequence[str]
) -> tuple[list[Announcement], list[ExpertAnnouncement]]:
    async with _joined(initial_peers) as network:
        return _in_order(await network.servers(model_digest)), await network.experts(model_digest)


def _show_once(
    model: str,
    checkpoint: Checkpoint,
    servers: list[Announcement],
    hosts: list[ExpertAnnouncement],
    output: Output,
) -> int:
    from rich.console import Console

    from swarm.commands.swarm_picture import server_table, servers_of_blocks, speed_table, verdict

    digest, num_blocks = checkpoint.model_digest, checkpoint.num_blocks
    redundancy = servers_of_blocks(servers, num_blocks)
    console = Console(stderr=output.json, width=None)
    if servers:
        console.print(server_table(f"{model}: {num_blocks} blocks", servers, num_blocks))
    if any(server.decode_steps_per_s for server in servers):
        console.print(speed_table(servers))
    output.say(verdict(redundancy))
    facts = _facts(digest, servers, redundancy)
    if hosts or any(server.kept_experts for server in servers):
        facts |= _show_experts(model, checkpoint, servers, hosts, console, output)
        facts["complete"] = facts["complete"] and not facts["missing_experts"]
    output.event(**facts)
    return 0 if facts["complete"] else 3


def _show_experts(
    model: str,
    checkpoint: Checkpoint,
    servers: list[Announcement],
    hosts: list[ExpertAnnouncement],
    console: Console,
    output: Output,
) -> dict[str, object]:
    from swarm.commands.expert_picture import expert_table, expert_verdict, missing_experts
    from swarm.models.experts import find_expert_tensors

    counts = {block: table.count for block, table in find_expert_tensors(checkpoint).items()}
    if hosts:
        console.print(expert_table(f"{model}: {sum(counts.values()):,} routed experts", hosts, counts))
    output.say(expert_verdict(servers, hosts, counts))
    missing = missing_experts(servers, hosts, counts)
    return {
        "missing_experts": {str(block): sorted(experts) for block, experts in missing.items()},
        "expert_servers": [
            host.model_dump(mode="json", exclude={"bitmaps"})
            | {"experts": {str(block): sorted(experts) for block, experts in host.experts.items()}}
            for host in hosts
        ],
    }


async def _watch(options: argparse.Namespace, digest: str, num_blocks: int, output: Output) -> None:
    """Look again and again: a picture that changes in a terminal; elsewhere a line for every change."""
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    from swarm.commands.swarm_picture import (
        changes,
        coverage_strip,
        moves_between,
        server_table,
        servers_of_blocks,
        verdict,
    )

    console = Console(stderr=output.json)
    recent: deque[str] = deque(maxlen=_SHOWN_CHANGES)
    before: list[Announcement] | None = None
    moves, said = 0, ""
    title = f"{options.model}: {num_blocks} blocks"
    async with _joined(options.initial_peers) as network:
        with Live(console=console, auto_refresh=False, transient=False) as live:
            while True:
                servers = _in_order(await network.servers(digest))
                redundancy, happened = servers_of_blocks(servers, num_blocks), []
                if before is not None:
                    happened, moves = changes(before, servers), moves + moves_between(before, servers)
                before = servers
                clock = time.strftime("%H:%M:%S")
                recent.extend(f"{clock}  {line}" for line in happened)
                if output.json:
                    output.event(**_facts(digest, servers, redundancy), moves_seen=moves, changes=happened)
                elif console.is_terminal:
                    summary = Text(f"{verdict(redundancy)} Moves seen: {moves}.")
                    parts = [server_table(title, servers, num_blocks), coverage_strip(redundancy), summary]
                    live.update(Group(*parts, Text("\n".join(recent), style="dim")), refresh=True)
                else:
                    for line in (*happened, *([verdict(redundancy)] if verdict(redundancy) != said else [])):
                        output.say(f"{clock}  {line}")
                    said = verdict(redundancy)
                await asyncio.sleep(options.every)


def _facts(digest: str, servers: Sequence[Announcement], redundancy: Sequence[int]) -> dict[str, object]:
    return {
        "model": digest,
        "num_blocks": len(redundancy),
        "complete": min(redundancy) > 0,
        "redundancy": list(redundancy),
        "servers": [server.model_dump(mode="json") for server in servers],
    }


@asynccontextmanager
async def _joined(initial_peers: Sequence[str]) -> AsyncIterator[Network]:
    from swarm.client import ClientSettings, Network

    network = await Network.join(ClientSettings(initial_peers=tuple(initial_peers)))
    try:
        yield network
    finally:
        await network.leave()


def _in_order(servers: Sequence[Announcement]) -> list[Announcement]:
    return sorted(servers, key=lambda server: (server.start, server.end, server.peer_id))
