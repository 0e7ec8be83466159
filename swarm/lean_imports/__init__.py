"""Import torch and transformers without what running a model never needs: half the time, 130 MB less in memory.

For programs of our own; who imports :mod:`swarm.client` into theirs gets both libraries whole. Import this first.
"""

import swarm.lean_imports.torch_kernels  # isort: skip  (before anything that imports torch)
import swarm.lean_imports.model_code  # noqa: F401  # isort: skip  (before anything that imports transformers' models)
