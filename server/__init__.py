"""Host a span of a model: load, cache, execute, announce, drain."""

import swarm.lean_imports  # noqa: F401  # isort: skip  (before anything that imports torch)
from swarm.models.quantization import SCHEMES
from swarm.server.lifecycle import Server
from swarm.server.settings import ServerSettings

__all__ = ["SCHEMES", "Server", "ServerSettings"]
