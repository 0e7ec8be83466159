"""``swarm demo``: the main job in one command. Servers start, a model answers, a server is killed, nothing changes."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from swarm.commands.local_swarm import LocalPeer, LocalSwarm
from swarm.commands.model_arguments import chat_inputs
from swarm.commands.output import Output

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from swarm.client import InferenceSession
    from swarm.models import Checkpoint

_PROMPT = "Explain in a few sentences why the sky is blue."
_BAR = "{desc} {bar:30} {n}/{total} [{elapsed}{postfix}]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``swarm demo``."""
    parser.add_argument("--prompt", default=_PROMPT, help=f"the question (default: {_PROMPT!r})")
    parser.add_argument(
        "--max-new-tokens", type=int, default=96, metavar="N", help="length of the answer (default: 96)"
    )
    parser.add_argument("--model", default="smollm2", help="(default: smollm2, which came with the installation)")


def run(options: argparse.Namespace, output: Output) -> int:
    """Returns 0 if the swarm's tokens equal the local model's, else 1."""
    import torch

    from swarm.models import open_checkpoint

    torch.set_num_threads(1)  # as the servers, so that the speeds compare
    output.say(f"Swarm demo: {options.model} on five processes of this machine, one of which will be killed.\n")
    checkpoint = open_checkpoint(options.model)
    tokenizer = checkpoint.tokenizer()
    inputs = chat_inputs(tokenizer, [{"role": "user", "content": options.prompt}])
    half = checkpoint.num_blocks // 2
    with LocalSwarm() as swarm:
        _start_servers(swarm, options.model, [f"0:{half}", f"{half}:{checkpoint.num_blocks}"] * 2, output)
        output.say(f"\nQuestion: {options.prompt}\nAnswer, through the swarm: ", end="")
        swarm_ids, figures = _answer_through(swarm, options, tokenizer, inputs, output)
    output.say("\nThe same question to the whole model in this process …")
    local_ids, local_tokens_per_s = _answer_locally(checkpoint, inputs, options.max_new_tokens)
    identical = torch.equal(swarm_ids, local_ids)
    output.say(
        f"\n  swarm:      {figures['swarm_tokens_per_s']:.1f} tokens/s, without the pause"
        f"\n  local:      {local_tokens_per_s:.1f} tokens/s"
        f"\n  pause:      {figures['pause_s']:.2f} s, from the kill to the next token"
        f"\n  identical:  {'yes' if identical else 'NO'}"
    )
    output.event(identical=identical, local_tokens_per_s=local_tokens_per_s, tokens=swarm_ids.shape[1], **figures)
    return 0 if identical else 1


def _start_servers(swarm: LocalSwarm, model: str, spans: list[str], output: Output) -> None:
    ready: list[LocalPeer] = []
    with tqdm(total=len(spans), desc="Starting servers", bar_format=_BAR) as bar:

        def on_ready(peer: LocalPeer) -> None:
            ready.append(peer)
            bar.update()

        def on_wait(peer: LocalPeer) -> None:
            bar.set_postfix_str(f"{peer.name}: {peer.at_work_on or 'Starting'}")

        swarm.start_servers(model, spans, "--threads", "1", on_ready=on_ready, on_wait=on_wait)
        bar.set_postfix_str("")
    for peer, span in zip(ready, spans, strict=True):
        start, end = span.split(":")
        output.say(f"  {peer.name}: blocks {start:>2} to {int(end) - 1:>2}   {peer.peer_id}   pid {peer.process.pid}")


def _answer_through(
    swarm: LocalSwarm, options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, inputs: Any, output: Output
) -> tuple[torch.Tensor, dict[str, Any]]:
    from swarm.client import AutoDistributedModelForCausalLM
    from swarm.commands.text_streamer import PrintingStreamer

    model = AutoDistributedModelForCausalLM.from_pretrained(options.model, initial_peers=swarm.initial_peers)
    killer = _Killer(swarm, after_tokens=options.max_new_tokens // 3, output=output)
    streamer = PrintingStreamer(tokenizer, output, on_token=killer.on_token)
    length = inputs["input_ids"].shape[1] + options.max_new_tokens
    with model.inference_session(max_length=length) as session:
        killer.session = session
        begun = time.perf_counter()
        ids = model.generate(
            **inputs, session=session, streamer=streamer, do_sample=False, max_new_tokens=options.max_new_tokens
        )
        seconds = time.perf_counter() - begun
        recoveries = len(session.recoveries)
    model.disconnect()
    return ids, {
        "killed_servers": len(killer.killed),
        "recoveries": recoveries,
        "pause_s": killer.pause_s,
        "swarm_tokens_per_s": streamer.tokens / (seconds - killer.pause_s),
    }


class _Killer:
    """Kills the server of the last blocks when the answer is under way.

    Attributes:
        pause_s: from the kill to the next token; 0: there was none.
    """

    def __init__(self, swarm: LocalSwarm, after_tokens: int, output: Output) -> None:
        self._swarm, self._after_tokens, self._output = swarm, after_tokens, output
        self.session: InferenceSession | None = None
        self.killed: list[str] = []
        self.pause_s = 0.0
        self._killed_at: float | None = None

    def on_token(self, count: int) -> None:
        if self._killed_at is not None:
            self.pause_s, self._killed_at = time.perf_counter() - self._killed_at, None
        if count == self._after_tokens and self.session is not None:
            victim = self._swarm.server(self.session.route[-1].peer_id)
            self._killed_at = time.perf_counter()
            victim.kill()
            self.killed.append(victim.peer_id)
            self._output.say(f" ⟨{victim.name} killed with SIGKILL⟩", end="")


def _answer_locally(checkpoint: Checkpoint, inputs: Any, max_new_tokens: int) -> tuple[torch.Tensor, float]:
    from swarm.models.local import load_whole_model

    model = load_whole_model(checkpoint)
    begun = time.perf_counter()
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    return ids, (ids.shape[1] - inputs["input_ids"].shape[1]) / (time.perf_counter() - begun)
