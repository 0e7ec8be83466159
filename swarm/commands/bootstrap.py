"""``swarm bootstrap``: a peer that hosts nothing and through which others find each other."""

from __future__ import annotations

import argparse
import asyncio
import signal
from pathlib import Path

from swarm.commands.addresses import listen_addresses
from swarm.commands.output import Output
from swarm.dht import Directory
from swarm.transport.identity import Identity
from swarm.transport.node import Node


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``swarm bootstrap``."""
    parser.add_argument("--host", default="0.0.0.0", help="IP address to listen on (default: all)")
    parser.add_argument("--port", type=int, default=0, help="port to listen on (default: any)")
    parser.add_argument(
        "--private-network", action="store_true", help="do not open the router's NAT, do not use relays"
    )
    parser.add_argument(
        "--identity", type=Path, metavar="FILE", help="key file, made if missing: keeps the address over restarts"
    )
    parser.add_argument(
        "--announce", nargs="+", default=[], metavar="ADDRESS", help="tell others these addresses instead"
    )
    parser.add_argument(
        "--initial-peers", nargs="+", default=[], metavar="ADDRESS", help="other peers of the same swarm"
    )


def run(options: argparse.Namespace, output: Output) -> int:
    """Serve the directory until Ctrl-C."""
    asyncio.run(_serve(options, output))
    output.say("Left the swarm.")
    return 0


async def _serve(options: argparse.Namespace, output: Output) -> None:
    leave = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, leave.set)
    public_network = not options.private_network and not options.host.startswith("127.")
    node = await Node.start(
        identity=Identity.load_or_create(options.identity) if options.identity else None,
        listen=listen_addresses(options.host, options.port, quic=public_network),
        announce=options.announce,
        public_network=public_network,
    )
    try:
        directory = await Directory.join(node, options.initial_peers)
        addresses = await node.addresses()
        output.say("This peer is up. Others join the swarm with --initial-peers and one of:")
        for address in addresses:
            output.say(f"  {address}")
        output.say("Press Ctrl-C to stop.")
        output.event(event="ready", peer_id=node.peer_id, addresses=addresses)
        try:
            async with node.while_daemon_lives():
                await leave.wait()
        finally:
            await directory.leave()
    finally:
        await node.stop()
