"""The common frame of all benchmarks: progress on stderr, one JSON object as the last line of stdout."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Report:
    """How one benchmark run was asked for, and where its figures go."""

    quick: bool
    json: bool

    @classmethod
    def from_command_line(cls, description: str) -> Report:
        """Parse ``--quick`` and ``--json``."""
        return cls.with_options(argparse.ArgumentParser(description=description))[0]

    @classmethod
    def with_options(cls, parser: argparse.ArgumentParser) -> tuple[Report, argparse.Namespace]:
        """Likewise, with options of the benchmark's own."""
        parser.add_argument("--quick", action="store_true", help="fewer repetitions, within two minutes")
        parser.add_argument("--json", action="store_true", help="end with one JSON object on stdout")
        options = parser.parse_args()
        return cls(options.quick, options.json), options

    def progress(self, text: str) -> None:
        """Say what is happening."""
        print(text, file=sys.stderr, flush=True)

    def finish(self, figures: dict[str, Any]) -> None:
        """Print the figures: for people, or as JSON."""
        if self.json:
            print(json.dumps(figures), flush=True)
            return
        width = max(map(len, figures))
        for key, value in figures.items():
            print(f"{key:<{width}}  {value:.3f}" if isinstance(value, float) else f"{key:<{width}}  {value}")
