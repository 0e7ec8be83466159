"""What ``generate`` and ``chat`` have in common: the model, the way into the swarm, and sampling."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from swarm.client import DistributedMixin


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, --initial-peers, --deadline, sampling."""
    parser.add_argument("model", help="alias (smollm2), directory, .gguf file, or Hugging Face Hub id")
    parser.add_argument("--initial-peers", nargs="+", required=True, metavar="ADDRESS", help="peers to join through")
    parser.add_argument(
        "--deadline", type=float, default=60.0, metavar="S", help="wait so long for missing blocks (default: 60)"
    )
    parser.add_argument(
        "--star", action="store_true", help="let everything pass through this client, not from server to server"
    )
    parser.add_argument(
        "--redundancy",
        type=int,
        choices=(1, 2),
        default=1,
        metavar="N",
        help="2: keep a second server of every span up to date, so that a death costs next to nothing (default: 1)",
    )
    parser.add_argument(
        "--activation-codec",
        metavar="NAME",
        help="send hidden states as int8, bfloat16 or float16: less to send, not exact any more (default: exactly)",
    )
    parser.add_argument(
        "--quantization",
        choices=("int8", "nf4", "int4"),
        help="use servers with such weights (default: unquantized ones)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="(default: 256)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default: 0)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="(default: 1)")
    parser.add_argument("--seed", type=int, help="make sampling repeatable")


def connect(options: argparse.Namespace) -> tuple[DistributedMixin, PreTrainedTokenizerBase]:
    """The model on the swarm, and its tokenizer."""
    import torch

    from swarm.client import AutoDistributedModelForCausalLM

    if options.seed is not None:
        torch.manual_seed(options.seed)
    model = AutoDistributedModelForCausalLM.from_pretrained(
        options.model,
        initial_peers=options.initial_peers,
        deadline_s=options.deadline,
        chain=not options.star,
        redundancy=options.redundancy,
        activation_codec=options.activation_codec,
        quantization=options.quantization,
    )
    return model, model.tokenizer()


def chat_inputs(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> Any:
    """The inputs of ``generate()`` for a conversation that the model is to continue."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def sampling(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of ``generate()``."""
    chosen: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "do_sample": options.temperature > 0}
    if options.temperature > 0:
        chosen |= {"temperature": options.temperature, "top_p": options.top_p}
    return chosen
