"""The routed experts of mixture-of-experts blocks, each of which may be on another server than its block."""

from swarm.models.experts.degraded import without_experts
from swarm.models.experts.loading import HostedExperts, load_experts
from swarm.models.experts.routed import Elsewhere, RoutedExperts, routed_experts
from swarm.models.experts.splitting import RoutedTables
from swarm.models.experts.tensors import ExpertTensors, find_expert_tensors

__all__ = [
    "Elsewhere", "ExpertTensors", "HostedExperts", "RoutedExperts", "RoutedTables",
    "find_expert_tensors", "load_experts", "routed_experts", "without_experts",
]  # fmt: skip
