"""``swarm health``: the public health dashboard of a swarm, as a web page, a JSON API and metrics."""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from swarm.commands.output import Output
from swarm.commands.web_address import add_web_arguments, url_of
from swarm.errors import ModelError

if TYPE_CHECKING:
    from swarm.health.model_facts import ModelFacts

_PORT = 8090
_DIGEST = re.compile("[0-9a-f]{64}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``swarm health``."""
    parser.add_argument(
        "models", nargs="*", metavar="MODEL",
        help="watch only these, also if nobody hosts them: alias (smollm2), directory, .gguf file, Hugging Face Hub "
        "id, or digest (default: all that servers list)",
    )  # fmt: skip
    parser.add_argument("--initial-peers", nargs="+", required=True, metavar="ADDRESS", help="peers to join through")
    add_web_arguments(parser, _PORT)
    parser.add_argument(
        "--history", type=Path, metavar="FILE", help="SQLite file for the last 30 days (default: in Swarm's cache)"
    )


def run(options: argparse.Namespace, output: Output) -> int:
    """Serve until Ctrl-C."""
    import uvloop

    from swarm.cache_directory import cache_directory
    from swarm.health.history import History
    from swarm.http_server import listening_socket
    from swarm.transport.node import PeerAddress

    for address in options.initial_peers:
        _ = PeerAddress(address).peer_id  # raises ValueError
    with listening_socket(options.host, options.port) as listening:
        history = History(options.history or cache_directory("health") / "history.sqlite")
        try:
            digests = [model for model in options.models if _DIGEST.fullmatch(model)]
            asked_for = {facts.digest: facts for facts in map(_facts, set(options.models) - set(digests))}
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(_serve(options, listening, history, asked_for, (*asked_for, *digests), output))
        finally:
            history.close()
    output.say("Left the swarm.")
    return 0


async def _serve(
    options: argparse.Namespace,
    listening: socket.socket,
    history: object,
    asked_for: Mapping[str, ModelFacts],
    only: Sequence[str],
    output: Output,
) -> None:
    from swarm.health.app import health_app
    from swarm.health.background import BackgroundTask
    from swarm.health.board import Board
    from swarm.health.chronicle import Chronicle
    from swarm.health.history import History
    from swarm.health.watch import Watch
    from swarm.http_server import serve

    assert isinstance(history, History)
    board = Board()
    chronicle = Chronicle(board, history, asked_for)
    watching = BackgroundTask(Watch(options.initial_peers, chronicle, only).run())
    url = f"{url_of(listening)}/"

    def ready() -> None:
        output.say(f"The dashboard is at {url}")
        output.say("Press Ctrl-C to stop.")
        output.event(event="ready", url=url)

    try:
        await serve(health_app(board, history), listening, ready, board.close)
    finally:
        await asyncio.to_thread(watching.stop)
        await asyncio.to_thread(chronicle.close)


def _facts(model: str) -> ModelFacts:
    """What a MODEL on the command line is."""
    from swarm.health.model_facts import ModelFacts, shown_model_name

    told = subprocess.run(
        [sys.executable, "-m", "swarm.commands.model_identity", model], capture_output=True, text=True, check=False
    )
    if told.returncode:
        raise ModelError(told.stderr.strip().splitlines()[-1] if told.stderr.strip() else f"{model} cannot be opened")
    facts = json.loads(told.stdout)
    experts = {int(block): count for block, count in facts["experts"].items()}
    return ModelFacts(facts["digest"], shown_model_name(model), facts["num_blocks"], experts)
