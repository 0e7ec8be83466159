"""Host a span of a model: load, cache, execute, announce, drain."""

import swarm.server.lean_torch  # isort: skip  (before anything that imports torch)
import swarm.server.lean_transformers  # noqa: F401  # isort: skip  (before anything that imports transformers' models)
from swarm.models.quantization import SCHEMES
from swarm.server.lifecycle import Server
from swarm.server.settings import ServerSettings

__all__ = ["SCHEMES", "Server", "ServerSettings"]
