"""``swarm api MODEL…``: the gateway, for tools that speak OpenAI's, Anthropic's or Ollama's API, and the chat page."""

from __future__ import annotations

import argparse
import asyncio
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from swarm.commands.output import Output
from swarm.commands.web_address import add_web_arguments, url_of

if TYPE_CHECKING:
    from swarm.api.keys import Callers
    from swarm.api.served_model import ServedModel
    from swarm.client import ClientSettings, Network

_PORT = 8000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``swarm api``."""
    parser.add_argument(
        "models", nargs="+", metavar="MODEL",
        help="alias (smollm2), directory, .gguf file, or Hugging Face Hub id; NAME=MODEL serves it under another name",
    )  # fmt: skip
    parser.add_argument("--initial-peers", nargs="+", required=True, metavar="ADDRESS", help="peers to join through")
    add_web_arguments(parser, _PORT)
    parser.add_argument(
        "--api-keys", type=Path, metavar="FILE", help="TOML file of keys and their limits (default: anybody may ask)"
    )
    parser.add_argument(
        "--requests-per-minute", type=float, metavar="N", help="without keys: of each address (default: no limit)"
    )
    parser.add_argument(
        "--max-requests", type=int, default=32, metavar="N", help="answer so many at once; others wait (default: 32)"
    )
    parser.add_argument(
        "--max-waiting",
        type=int,
        default=128,
        metavar="N",
        help="let so many wait; more are told when to come back (default: 128)",
    )
    parser.add_argument(
        "--queue-timeout", type=float, default=60.0, metavar="S", help="let nobody wait longer than this (default: 60)"
    )
    parser.add_argument(
        "--deadline", type=float, default=60.0, metavar="S", help="wait so long for missing blocks (default: 60)"
    )
    parser.add_argument(
        "--redundancy", type=int, choices=(1, 2), default=1, metavar="N",
        help="2: keep a second server of every span up to date, so that a death costs next to nothing (default: 1)",
    )  # fmt: skip
    parser.add_argument("--quantization", choices=("int8", "nf4", "int4"), help="use servers with such weights")


def run(options: argparse.Namespace, output: Output) -> int:
    """Serve until Ctrl-C."""
    import uvloop

    from swarm.api.keys import Callers, read_keys
    from swarm.http_server import listening_socket

    for name in ("max_requests", "max_waiting", "queue_timeout"):
        if not getattr(options, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0")
    if options.api_keys is not None and options.requests_per_minute is not None:
        raise ValueError("--requests-per-minute is for gateways without keys; a key's limits are in its file")
    keys = read_keys(options.api_keys) if options.api_keys is not None else None
    callers = Callers(keys, options.requests_per_minute)
    listening = listening_socket(options.host, options.port)
    with listening, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(options, listening, callers, output))
    output.say("Left the swarm.")
    return 0


async def _serve(options: argparse.Namespace, listening: socket.socket, callers: Callers, output: Output) -> None:
    from swarm.api.app import gateway_app
    from swarm.api.gateway import Gateway
    from swarm.api.queue import Queue
    from swarm.client import ClientSettings, Network
    from swarm.http_server import serve

    settings = ClientSettings(
        initial_peers=tuple(options.initial_peers),
        deadline_s=options.deadline,
        redundancy=options.redundancy,
        quantization=options.quantization,
    )
    network = await Network.join(settings)
    try:
        models = [await asyncio.to_thread(_open, name, network, settings, output) for name in options.models]
        if len({model.name for model in models}) < len(models):
            raise ValueError("two models have the same name; give one another: NAME=MODEL")
        queue = Queue(options.max_requests, options.max_waiting, options.queue_timeout)
        gateway = Gateway(models, callers, queue)
        url = url_of(listening)

        def ready() -> None:
            output.say(f"Serving {', '.join(gateway.models)}.")
            output.say(f"  chat page        {url}/")
            output.say(f"  OpenAI clients   {url}/v1")
            output.say(f"  Anthropic, Ollama clients   {url}")
            output.say("Press Ctrl-C to stop.")
            output.event(event="ready", url=url, models=list(gateway.models), peer_id=network.peer_id)

        try:
            async with network.while_daemon_lives():
                await serve(gateway_app(gateway), listening, ready)
        finally:
            for model in models:
                await model.streams.close()
    finally:
        await network.leave()


def _open(name: str, network: Network, settings: ClientSettings, output: Output) -> ServedModel:
    from swarm.api.served_model import ServedModel
    from swarm.client import TokenStreams
    from swarm.models import open_checkpoint

    called, _, model = name.rpartition("=")
    output.say(f"Loading embeddings and head of {model}…")
    checkpoint = open_checkpoint(model)
    streams = TokenStreams(network, checkpoint, quantized=settings.quantization is not None)
    return ServedModel(called or _short(model), streams)


def _short(model: str) -> str:
    """A name for callers: of a path only the last part."""
    return Path(model).name.removesuffix(".gguf") if Path(model).exists() else model
