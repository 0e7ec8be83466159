"""``swarm moefy MODEL OUTPUT``: a dense model as a mixture of experts that gives the same answers."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from swarm.commands.output import Output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``swarm moefy``."""
    parser.add_argument("model", help="a Llama or Mistral: alias (smollm2), directory, .gguf file, Hub id")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="directory to write the checkpoint to")
    parser.add_argument(
        "--experts",
        type=int,
        required=True,
        metavar="N",
        help="cut every feed-forward network into N experts: a power of two",
    )
    parser.add_argument(
        "--top-k",
        type=int,
        metavar="K",
        help="run K experts for each token; with fewer than N, answers differ from the dense model's (default: N)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        metavar="S",
        help="give routers tiny random weights, so that with --top-k different tokens get different experts "
        "(default: zeros)",
    )
    parser.add_argument("--force", action="store_true", help="replace a checkpoint that is in OUTPUT")


def run(options: argparse.Namespace, output: Output) -> int:
    """Write the checkpoint, and say how large it is."""
    from tqdm import tqdm

    from swarm.models import open_checkpoint
    from swarm.models.moefy import moefy

    checkpoint = open_checkpoint(options.model)
    total = sum(entry.elements for entry in checkpoint.files.entries.values())
    begun = time.perf_counter()
    with tqdm(total=total, unit=" weights", unit_scale=True, desc="Slicing weights", delay=2, leave=False) as bar:
        config = moefy(
            checkpoint,
            options.output,
            options.experts,
            top_k=options.top_k,
            seed=options.seed,
            overwrite=options.force,
            on_elements=bar.update,
        )
    took_s = time.perf_counter() - begun
    size_bytes = sum(path.stat().st_size for path in options.output.glob("model-*.safetensors"))
    experts, top_k = config.num_local_experts, config.num_experts_per_tok
    output.say(
        f"{options.output}: {options.model} with {experts} experts in each of {checkpoint.num_blocks} blocks, "
        f"{size_bytes / 1e6:,.1f} MB, written in {took_s:.1f} s."
    )
    if top_k < experts:
        output.say(f"Only {top_k} of {experts} experts run for each token: its answers are not the dense model's.")
    else:
        output.say("It computes what the dense model computes, up to the order of sums.")
    output.event(
        output=str(options.output),
        blocks=checkpoint.num_blocks,
        experts=experts,
        top_k=top_k,
        dtype=str(config.dtype).removeprefix("torch."),
        size_bytes=size_bytes,
        took_s=took_s,
    )
    return 0
