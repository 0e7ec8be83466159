"""Who should host what: pure functions over a snapshot of announcements."""

from swarm.placement.join import choose_span

__all__ = ["choose_span"]
