"""``swarm digest MODEL``: the checksums that name a model and each of its blocks."""

from __future__ import annotations

import argparse

from swarm.commands.output import Output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``swarm digest``."""
    parser.add_argument("model", help="alias (smollm2), directory, .gguf file, or Hugging Face Hub id")
    parser.add_argument(
        "--write", action="store_true", help="keep them beside the weights, so that every server checks what it loads"
    )


def run(options: argparse.Namespace, output: Output) -> int:
    """Print (and write) the digests."""
    from swarm.models import open_checkpoint
    from swarm.models.digests import MANIFEST

    checkpoint = open_checkpoint(options.model)
    manifest = (
        checkpoint.location / MANIFEST if checkpoint.location.is_dir() else checkpoint.location.with_name(MANIFEST)
    )
    if options.write:
        manifest.unlink(missing_ok=True)
    digests = checkpoint.digests
    output.say(f"{options.model}: {digests.model}")
    for block, digest in enumerate(digests.blocks):
        output.say(f"  block {block:>3}  {digest}")
    output.say(f"  shell      {digests.shell}")
    output.event(model=digests.model, shell=digests.shell, blocks=list(digests.blocks))
    if options.write:
        try:
            manifest.write_text(digests.to_json())
        except OSError as error:
            raise ValueError(f"{manifest} cannot be written: {error}") from error
        output.say(f"Written to {manifest}.")
    return 0
