"""Who should host what: pure functions over a snapshot of announcements."""

from swarm.placement.coverage import Coverage, Quality
from swarm.placement.expert_coverage import ExpertCoverage, ExpertHost
from swarm.placement.expert_demand import ExpertDemand
from swarm.placement.experts import ExpertJoiner, choose_experts, local_experts, share_experts, wanted_repair
from swarm.placement.focus import FocusPolicy
from swarm.placement.hosting import Capacity, Hosting, Loaded, Span
from swarm.placement.join import choose_span, settle
from swarm.placement.moves import Move, MovePolicy, Urgency, wanted_move
from swarm.placement.turns import goes_before, may_move

__all__ = [
    "Capacity", "Coverage", "ExpertCoverage", "ExpertDemand", "ExpertHost", "ExpertJoiner", "FocusPolicy",
    "Hosting", "Loaded", "Move", "MovePolicy", "Quality", "Span", "Urgency", "choose_experts", "choose_span",
    "goes_before", "local_experts", "may_move", "settle", "share_experts", "wanted_move", "wanted_repair",
]  # fmt: skip
