"""``swarm generate MODEL --prompt …``: continue a prompt, streaming."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict

from swarm.commands.model_arguments import add_model_arguments, chat_inputs, connect, sampling
from swarm.commands.output import Output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``swarm generate``."""
    add_model_arguments(parser)
    parser.add_argument("--prompt", required=True, help="the text to continue, or with --chat the question to answer")
    parser.add_argument("--explain", action="store_true", help="show the route, and where the time went on it")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")


def run(options: argparse.Namespace, output: Output) -> int:
    """Generate and print."""
    from swarm.commands.explain import StepRecorder
    from swarm.commands.text_streamer import PrintingStreamer

    model, tokenizer = connect(options)
    if options.chat:
        inputs = chat_inputs(tokenizer, [{"role": "user", "content": options.prompt}])
    else:
        inputs = tokenizer(options.prompt, return_tensors="pt")
    prompt_tokens = inputs["input_ids"].shape[1]
    with model.inference_session(max_length=prompt_tokens + options.max_new_tokens) as session:
        streamer = StepRecorder(session, PrintingStreamer(tokenizer, output))
        begun = time.perf_counter()
        ids = model.generate(**inputs, session=session, streamer=streamer, **sampling(options))
        seconds = time.perf_counter() - begun
        new_ids = ids[0, prompt_tokens:]
        output.event(
            text=tokenizer.decode(new_ids, skip_special_tokens=True),
            token_ids=new_ids.tolist(),
            tokens_per_s=len(new_ids) / seconds,
            route=[asdict(leg) for leg in session.route],
            recoveries=[asdict(recovery) for recovery in session.recoveries],
            **({"explanation": streamer.figures()} if options.explain else {}),
        )
        if options.explain:
            output.say("\n" + "\n".join(streamer.lines()))
    model.disconnect()
    return 0
