"""Which way a session should go: pure functions over a snapshot of announcements."""

from swarm.routing.route import HostedSpan, Leg, find_route, uncovered_blocks

__all__ = ["HostedSpan", "Leg", "find_route", "uncovered_blocks"]
