"""How every command speaks: sentences for people on stderr or stdout, JSON for scripts, one line per error."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from swarm.errors import SwarmError


@dataclass
class Output:
    """Where a command writes.

    With ``--json``, stdout carries JSON objects, one per line, and nothing else; sentences go to stderr.
    """

    json: bool
    is_within_line: bool = False
    """What was said last has not ended its line."""

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> Output:
        """Set up logging and the output of a command from its parsed options."""
        level = logging.DEBUG if options.verbose else logging.WARNING
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr, force=True)
        logging.getLogger("swarm").setLevel(level)
        return cls(options.json)

    def say(self, text: str = "", *, end: str = "\n") -> None:
        """A sentence for a person."""
        print(text, end=end, file=sys.stderr if self.json else sys.stdout, flush=True)
        self.is_within_line = not (text + end).endswith("\n")

    def event(self, **fields: Any) -> None:
        """One JSON object, for scripts only."""
        if self.json:
            print(json.dumps(fields), flush=True)


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """``--json`` and ``--verbose``."""
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="JSON on stdout, one object per line")
    group.add_argument("--verbose", action="store_true", help="say what happens underneath, and show tracebacks")


def run_command(command: Callable[[], int], output: Output) -> int:
    """Run a command; turn what it raises on purpose into one clear message and a code."""
    try:
        return command()
    except (SwarmError, ValueError) as error:
        if logging.getLogger("swarm").isEnabledFor(logging.DEBUG):
            logging.getLogger("swarm").exception("the command failed")
        if output.is_within_line:
            output.say()
        print(f"error: {error}", file=sys.stderr)
        output.event(event="error", kind=type(error).__name__, message=str(error))
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
