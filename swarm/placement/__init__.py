"""Who should host what: pure functions over a snapshot of announcements."""

from swarm.placement.coverage import Coverage, Quality
from swarm.placement.hosting import Capacity, Hosting, Span
from swarm.placement.join import choose_span, settle
from swarm.placement.moves import Move, MovePolicy, Urgency, goes_before, may_move, wanted_move

__all__ = [
    "Capacity", "Coverage", "Hosting", "Move", "MovePolicy", "Quality", "Span", "Urgency", "choose_span", "goes_before",
    "may_move", "settle", "wanted_move",
]  # fmt: skip
