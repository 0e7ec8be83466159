"""Draw the course of a simulated swarm: coverage, speed, moves."""

from __future__ import annotations

from pathlib import Path

from swarm.errors import SwarmError
from swarm.simulation.outcome import Outcome


class PlotError(SwarmError):
    """The picture cannot be drawn, or not be written."""


def plot(outcome: Outcome, title: str, path: Path) -> None:
    """Write a picture; its kind follows from the name (``.svg``, ``.png``, ``.pdf``).

    Raises:
        PlotError: matplotlib is missing, or the file cannot be written, or is of an unknown kind.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError(
            "A picture needs matplotlib: pip install 'swarm[plots]'. Without --plot it is not needed."
        ) from error
    minutes = [one.at_s / 60 for one in outcome.samples]
    figure = Figure(figsize=(9, 8), layout="constrained")
    coverage, speed, moves = figure.subplots(3, 1, sharex=True)
    figure.suptitle(title)
    coverage.plot(minutes, [one.uncovered for one in outcome.samples], color="tab:red", label="without a server")
    coverage.plot(minutes, [one.single for one in outcome.samples], color="tab:orange", label="with one or none")
    coverage.set_ylabel("blocks")
    coverage.legend()
    speed.plot(minutes, [one.bound_steps_per_s for one in outcome.samples], color="0.6", label="bound")
    speed.plot(minutes, [one.steps_per_s for one in outcome.samples], color="tab:blue", label="slowest block")
    speed.set_ylabel("steps/s")
    speed.legend()
    moves.plot(minutes, [one.servers for one in outcome.samples], color="0.6", label="servers")
    moves.plot(minutes, [one.moves for one in outcome.samples], color="tab:green", label="moves so far")
    moves.set_xlabel("minutes")
    moves.legend()
    for axes in (coverage, speed, moves):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if outcome.mass_failure_at_s is not None:
            axes.axvline(outcome.mass_failure_at_s / 60, color="tab:red", linestyle=":")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise PlotError(f"The picture cannot be written to {path}: {error}") from error
