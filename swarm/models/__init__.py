"""Open a checkpoint, and build the module that runs one span of it or the shell around all spans."""

from swarm.models.checkpoint import ALIASES, Checkpoint, open_checkpoint
from swarm.models.digests import Digests
from swarm.models.families import EXACT_FAMILIES
from swarm.models.shell import load_shell
from swarm.models.span import Span, SpanCache, load_span

__all__ = [
    "ALIASES", "EXACT_FAMILIES", "Checkpoint", "Digests", "Span", "SpanCache", "load_shell", "load_span",
    "open_checkpoint",
]  # fmt: skip
