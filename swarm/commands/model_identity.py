"""``python -m swarm.commands.model_identity MODEL``: what names a model, as JSON, for programs without torch."""

from __future__ import annotations

import json
import sys


def main() -> None:
    """Print the digest, the number of blocks, and the routed experts of every block that has any."""
    from swarm.errors import SwarmError
    from swarm.models import open_checkpoint
    from swarm.models.experts import find_expert_tensors

    try:
        checkpoint = open_checkpoint(sys.argv[1])
        has_experts = any("expert" in name for name in checkpoint.tensor_names(checkpoint.num_blocks - 1))
        tables = find_expert_tensors(checkpoint) if has_experts else {}
        facts = {
            "digest": checkpoint.model_digest,
            "num_blocks": checkpoint.num_blocks,
            "experts": {block: table.count for block, table in tables.items()},
        }
    except (SwarmError, ValueError) as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
