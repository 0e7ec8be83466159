"""Host a span of a model: load, cache, execute, announce, drain."""

from swarm.server.lifecycle import Server
from swarm.server.settings import ServerSettings

__all__ = ["Server", "ServerSettings"]
