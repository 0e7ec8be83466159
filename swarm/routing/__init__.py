"""Which way a session should go: pure functions over a snapshot of announcements and of measured links."""

from swarm.routing.costs import HOP_S, INTERACTIVE, PROFILES, Profile
from swarm.routing.experts import Assignment, ExpertChoice, assign_experts
from swarm.routing.failures import FailureMemory, FailurePolicy, Standing
from swarm.routing.rerouting import ReroutePolicy, worth_rerouting
from swarm.routing.route import find_route, least_seconds, route_seconds, uncovered_blocks
from swarm.routing.snapshot import ClientLinks, HostedSpan, Leg, with_estimates

__all__ = [
    "HOP_S",
    "INTERACTIVE",
    "PROFILES",
    "Assignment",
    "ClientLinks",
    "ExpertChoice",
    "FailureMemory",
    "FailurePolicy",
    "HostedSpan",
    "Leg",
    "Profile",
    "ReroutePolicy",
    "Standing",
    "assign_experts",
    "find_route",
    "least_seconds",
    "route_seconds",
    "uncovered_blocks",
    "with_estimates",
    "worth_rerouting",
]
