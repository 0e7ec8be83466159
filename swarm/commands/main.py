"""``swarm COMMAND``: everything but donating, which is ``swarm-server``."""

from __future__ import annotations

import argparse
import importlib
import sys

from swarm import __version__
from swarm.commands.output import Output, add_output_arguments, run_command

_COMMANDS = {
    "demo": "a swarm on this machine: it answers a prompt while one of its servers is killed",
    "generate": "continue a prompt on a swarm",
    "api": "serve models of a swarm to tools that speak OpenAI's, Anthropic's or Ollama's API, and a chat page",
    "chat": "talk to a model on a swarm",
    "status": "which blocks of a model are hosted, and by whom",
    "bootstrap": "run a peer through which others find each other",
    "health": "a web page that shows how a swarm is, now and over the last month",
    "simulate": "what becomes of a swarm of so many servers, and how evenly they share the work",
    "digest": "show or write the checksums of a model's weights",
    "moefy": "turn a dense model into a mixture of experts that gives the same answers",
}

_LEAN = {"api", "chat", "digest", "generate", "moefy", "status"}
"""Commands that need torch and transformers, but not all of them: they leave the whole model to others."""

_EPILOG = """\
try it:
  swarm demo                                 everything at once, on this machine
run a swarm of your own:
  swarm bootstrap --port 31337               prints the address for the others
  swarm-server smollm2 --initial-peers ADDRESS
  swarm chat smollm2 --initial-peers ADDRESS
`swarm COMMAND --help` explains each command."""


def main(arguments: list[str] | None = None) -> int:
    """Entry point of ``swarm``."""
    parser = argparse.ArgumentParser(
        prog="swarm",
        description="Run language models too large for one machine, together.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"swarm {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((word for word in (sys.argv[1:] if arguments is None else arguments) if word in _COMMANDS), None)
    for name, summary in _COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if name == chosen:  # only the chosen command's module is imported: torch takes seconds
            importlib.import_module(f"swarm.commands.{name}").add_arguments(subparser)
        add_output_arguments(subparser)
    options = parser.parse_args(arguments)
    output = Output.from_options(options)
    command = importlib.import_module(f"swarm.commands.{options.command}")

    def run() -> int:
        if options.command in _LEAN:
            importlib.import_module("swarm.lean_imports")
        return int(command.run(options, output))

    return run_command(run, output)


if __name__ == "__main__":
    sys.exit(main())
