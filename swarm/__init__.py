"""Swarm: a volunteer peer-to-peer network that runs language models too large for any of its members."""

from swarm.transformers_index import remember_index

__version__ = "0.1.0"

remember_index()
