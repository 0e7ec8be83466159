"""``swarm chat MODEL``: a conversation in the terminal, whose context stays on the servers."""

from __future__ import annotations

import argparse
import sys

from swarm.commands.model_arguments import add_model_arguments, chat_inputs, connect, sampling
from swarm.commands.output import Output

_ROOM_TOKENS = 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``swarm chat``."""
    add_model_arguments(parser)
    parser.add_argument("--system", help="instructions that come before the conversation")


def run(options: argparse.Namespace, output: Output) -> int:
    """Read questions from the terminal (or a pipe) until the end."""
    from swarm.client import RemoteCache
    from swarm.commands.text_streamer import PrintingStreamer

    model, tokenizer = connect(options)
    if tokenizer.chat_template is None:
        raise ValueError(f"{options.model} has no chat template, so it cannot chat; use `swarm generate`")
    output.say(f"Talking to {options.model}. /new begins anew, /quit or Ctrl-D ends.")
    opening = [{"role": "system", "content": options.system}] if options.system else []
    messages = list(opening)
    cache = RemoteCache(model.inference_session(max_length=_ROOM_TOKENS))
    while True:
        question = _ask(output)
        if question is None or question == "/quit":
            break
        if question == "/new":
            messages, cache = list(opening), RemoteCache(model.inference_session(max_length=_ROOM_TOKENS))
            continue
        if not question:
            continue
        messages.append({"role": "user", "content": question})
        inputs = chat_inputs(tokenizer, messages)
        streamer = PrintingStreamer(tokenizer, output)
        cache.keep_common_prefix(inputs["input_ids"])
        try:
            ids = model.generate(**inputs, past_key_values=cache, streamer=streamer, **sampling(options))
        except KeyboardInterrupt:
            output.say("\n(stopped)")
            messages.pop()
            continue
        cache.token_ids = ids
        answer = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
        output.event(question=question, answer=answer)
    model.disconnect()
    return 0


def _ask(output: Output) -> str | None:
    try:
        if sys.stdin.isatty():
            return input("\n> ").strip()
        line = sys.stdin.readline()
        return line.strip() if line else None
    except (EOFError, KeyboardInterrupt):
        output.say()
        return None
