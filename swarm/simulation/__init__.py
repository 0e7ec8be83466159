"""Thousands of servers in one process, over the very functions that place real ones."""

from swarm.simulation.outcome import Outcome
from swarm.simulation.strategies import STRATEGIES, Strategy
from swarm.simulation.swarm import simulate
from swarm.simulation.world import World

__all__ = ["STRATEGIES", "Outcome", "Strategy", "World", "simulate"]
