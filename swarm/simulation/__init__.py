"""Thousands of servers in one process, over the very functions that place real ones."""

from swarm.simulation.expert_strategies import EXPERT_STRATEGIES, ExpertStrategy
from swarm.simulation.expert_world import MODELS, ExpertModel, ExpertWorld
from swarm.simulation.experts import ExpertOutcome, simulate_experts
from swarm.simulation.outcome import Outcome
from swarm.simulation.strategies import STRATEGIES, Strategy
from swarm.simulation.swarm import simulate
from swarm.simulation.world import World

__all__ = [
    "EXPERT_STRATEGIES", "MODELS", "STRATEGIES", "ExpertModel", "ExpertOutcome", "ExpertStrategy", "ExpertWorld",
    "Outcome", "Strategy", "World", "simulate", "simulate_experts",
]  # fmt: skip
