"""The commands: ``swarm …`` and ``swarm-server``."""
