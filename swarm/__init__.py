"""Swarm: a volunteer peer-to-peer network that runs language models too large for any of its members."""

__version__ = "0.1.0"
