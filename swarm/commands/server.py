"""``swarm-server MODEL``: donate this machine to a swarm."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import re
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import swarm.lean_imports  # noqa: F401  # isort: skip  (before anything that imports torch)
import torch
import uvloop

from swarm.commands.addresses import listen_addresses
from swarm.commands.output import Output, add_output_arguments, run_command
from swarm.commands.speeds import compute_sentence, network_sentence
from swarm.dht import Announcement, ExpertAnnouncement
from swarm.dht.expert_announcement import experts_in
from swarm.number_runs import runs, runs_text
from swarm.placement import Move, MovePolicy
from swarm.protocol.tensors import dtype_name
from swarm.server import SCHEMES, Server, ServerSettings
from swarm.server.experts.lifecycle import ExpertServer
from swarm.server.experts.preparation import prepare_experts
from swarm.server.experts.wanted import WantedExperts, describe
from swarm.server.neighbours import NetworkSpeed
from swarm.server.preparation import Prepared, prepare

_EPILOG = """\
examples:
  swarm-server smollm2                                    begin a new swarm that serves the built-in test model
  swarm-server meta-llama/Llama-3.1-70B --initial-peers /ip4/203.0.113.5/tcp/31337/p2p/12D3KooW…
                                                          join one: host as many blocks as fit, where they are needed
  swarm-server ./my-model --blocks 0:16 --memory 12GiB    host the first 16 blocks in at most 12 GiB
  swarm-server ./my-model --blocks 0:16 --memory 6GiB --offload
                                                          the same in 6 GiB: what does not fit comes from disk each step
  swarm-server mistralai/Mixtral-8x7B-v0.1 --experts 0:0-3,1:0-3 --initial-peers …
                                                          host four experts of the first two blocks, and no block
  swarm-server mistralai/Mixtral-8x7B-v0.1 --blocks 0:32 --experts auto --initial-peers …
                                                          all attention, and as many experts as fit

Ctrl-C leaves politely: running sessions move to other servers first. A second Ctrl-C stops at once.
Servers see the hidden states that pass through them. Nobody can run code on your machine."""

_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: list[str] | None = None) -> int:
    """Entry point of ``swarm-server``."""
    options = _parser().parse_args(arguments)
    output = Output.from_options(options)
    settings = _settings(options)
    return run_command(lambda: (_run_experts if settings.experts_only else _run)(settings, output), output)


def _run_experts(settings: ServerSettings, output: Output) -> int:
    prepared = prepare_experts(settings)
    server = ExpertServer(settings, prepared)

    def show_plan(hosted: Mapping[int, frozenset[int]]) -> None:
        output.say(f"Plan for experts of {settings.model} on {prepared.device}, {dtype_name(prepared.dtype)}:")
        for line in prepared.lines(hosted):
            output.say(line)
        output.event(
            event="plan",
            device=str(prepared.device),
            dtype=dtype_name(prepared.dtype),
            experts=sum(map(len, hosted.values())),
            memory_bytes=prepared.memory_bytes,
            weight_bytes=prepared.weight_bytes(hosted),
        )

    def show_ready(announcement: ExpertAnnouncement) -> None:
        output.say(f"Serving {describe(announcement.experts)}, as {announcement.peer_id}.")
        if announcement.rows_per_s is not None:
            output.say(f"One expert computes {announcement.rows_per_s:,.0f} tokens/s.")
        for address in announcement.addresses:
            output.say(f"  others can join with --initial-peers {address}")
        output.say("Press Ctrl-C to leave.")
        output.event(
            event="ready",
            peer_id=announcement.peer_id,
            addresses=list(announcement.addresses),
            experts={str(block): sorted(experts) for block, experts in announcement.experts.items()},
            rows_per_s=announcement.rows_per_s,
        )

    def show_repair(announcement: ExpertAnnouncement) -> None:
        output.say(f"Nobody hosted some experts any more. Serving {describe(announcement.experts)} now.")
        output.event(
            event="repaired",
            experts={str(block): sorted(experts) for block, experts in announcement.experts.items()},
        )

    def said_at_the_end() -> dict[str, object]:
        done = server.contribution
        if done.calls:
            output.say(f"It computed experts for {done.tokens:,} tokens, in {done.calls:,} calls.")
        return dataclasses.asdict(done)

    return _until_left(server.leave, lambda: server.run(show_plan, show_ready, show_repair), output, said_at_the_end)


def _run(settings: ServerSettings, output: Output) -> int:
    prepared = prepare(settings)
    _show_plan(settings, prepared, output)
    server = Server(settings, prepared)
    network_was_shown = False

    def show_network(speed: NetworkSpeed) -> None:
        nonlocal network_was_shown
        if not network_was_shown and (sentence := network_sentence(speed)):
            output.say(sentence)
            network_was_shown = True
        output.event(event="network", **dataclasses.asdict(speed))

    return _until_left(
        server.leave,
        lambda: server.run(
            lambda announcement: _show_ready(announcement, output),
            show_network,
            lambda announcement, move: _show_move(announcement, move, output),
        ),
        output,
    )


def _until_left(
    leave: Callable[[], None],
    run: Callable[[], Awaitable[None]],
    output: Output,
    at_the_end: Callable[[], dict[str, object]] = dict,
) -> int:
    """Run a server; the first Ctrl-C lets it `leave`, the second ends it. Returns the exit code.

    Args:
        at_the_end: returns what is to be added to the last event.
    """

    async def serve() -> None:
        loop, main_task = asyncio.get_running_loop(), asyncio.current_task()
        assert main_task is not None
        signals = 0

        def interrupted() -> None:
            nonlocal signals
            signals += 1
            if signals == 1:
                output.say("\nLeaving: sessions are moving to other servers. Press Ctrl-C again to stop at once.")
                leave()
            else:
                main_task.cancel()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, interrupted)
        await run()

    try:
        uvloop.run(serve())
    except asyncio.CancelledError:
        output.say("Stopped at once; clients will find other servers by themselves.")
        return 130
    output.say("Left the swarm.")
    output.event(event="left", **at_the_end())
    return 0


def _show_plan(settings: ServerSettings, prepared: Prepared, output: Output) -> None:
    plan = prepared.plan
    weights = f", {settings.quantization} weights" if settings.quantization else ""
    output.say(f"Plan for {settings.model} on {prepared.device}, {dtype_name(prepared.dtype)}{weights}:")
    for line in plan.lines():
        output.say(line)
    output.event(
        event="plan",
        device=str(prepared.device),
        dtype=dtype_name(prepared.dtype),
        quantization=settings.quantization,
        num_blocks=plan.num_blocks,
        offloaded_blocks=plan.offloaded_blocks,
        window_blocks=plan.window_blocks,
        memory_bytes=plan.memory_bytes,
        weight_bytes=plan.weight_bytes,
        expert_bytes=plan.expert_bytes,
        kv_bytes=plan.kv_bytes,
        kv_tokens=plan.kv_tokens,
    )


def _show_ready(announcement: Announcement, output: Output) -> None:
    kept = {block: experts_in(bytes.fromhex(bitmap)) for block, bitmap in announcement.kept_experts.items()}
    output.say(
        f"Serving blocks {announcement.start} to {announcement.end - 1} of {announcement.num_blocks} "
        f"at {announcement.throughput:.1f} steps/s as {announcement.peer_id}."
    )
    if announcement.kept_experts:
        here = describe({block: experts for block, experts in kept.items() if experts})
        output.say(
            f"Of the experts of blocks {runs_text(runs(sorted(kept)))}, here are: {here or 'none'}. The others are "
            "computed by servers that host them."
        )
    output.say(compute_sentence(announcement))
    for address in announcement.addresses:
        output.say(f"  others can join with --initial-peers {address}")
    output.say("Press Ctrl-C to leave.")
    output.event(
        event="ready",
        peer_id=announcement.peer_id,
        addresses=list(announcement.addresses),
        start=announcement.start,
        end=announcement.end,
        throughput=announcement.throughput,
        decode_steps_per_s=announcement.decode_steps_per_s,
        prefill_tokens_per_s=announcement.prefill_tokens_per_s,
        free_kv_tokens=announcement.free_kv_tokens,
        kept_experts={str(block): sorted(experts) for block, experts in kept.items()},
    )


def _show_move(announcement: Announcement, move: Move, output: Output) -> None:
    done = "Of the blocks in memory, hosting now" if move.is_focus else "Moved to"
    output.say(
        f"{done} {move.reason} (before: {move.old[0]} to {move.old[1] - 1}). "
        f"Serving them at {announcement.throughput:.1f} steps/s."
    )
    output.event(
        event="focused" if move.is_focus else "moved",
        old=list(move.old),
        new=list(move.new),
        urgency=move.urgency.name.lower(),
        moves=announcement.moves,
        throughput=announcement.throughput,
    )


def _settings(options: argparse.Namespace) -> ServerSettings:
    public_network = not options.private_network and not options.host.startswith("127.")
    return ServerSettings(
        model=options.model,
        initial_peers=tuple(options.initial_peers),
        blocks=options.blocks,
        num_blocks=options.num_blocks,
        experts_only=options.role == "experts"
        or (options.role is None and options.experts is not None and options.blocks is None and not options.num_blocks),
        experts=options.experts,
        experts_deadline_s=options.experts_deadline,
        memory_bytes=options.memory,
        kv_tokens=options.kv_tokens,
        device=options.device,
        dtype=_DTYPES[options.dtype],
        quantization=options.quantize,
        offload=options.offload,
        threads=options.threads,
        measure_again=options.measure_again,
        listen=listen_addresses(options.host, options.port, quic=public_network),
        announce=tuple(options.announce),
        public_network=public_network,
        identity=options.identity,
        public_name=options.public_name,
        revision=options.revision,
        allow_untested_family=options.allow_untested_family,
        max_sessions=options.max_sessions,
        reuses_prompts=options.reuses_prompts,
        drain_timeout_s=options.drain_timeout,
        rebalances=options.rebalances,
        rebalance_interval_s=options.rebalance_every,
        claim_wait_s=options.claim_wait,
        settle_wait_s=options.settle_wait,
        move_policy=MovePolicy(away_s=options.move_cost, horizon_s=options.move_horizon),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="swarm-server",
        description="Donate this machine: host some of a model's blocks for everybody in the swarm.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="alias (smollm2), directory, .gguf file, or Hugging Face Hub id")
    what = parser.add_argument_group("what to host")
    what.add_argument(
        "--blocks", type=parse_blocks, default=None, metavar="A:B|auto",
        help="the span [A, B), or `auto`: as many as fit, where they are needed most, now and later (default: auto)",
    )  # fmt: skip
    what.add_argument("--num-blocks", type=_positive, metavar="N", help="with --blocks auto: host exactly N blocks")
    what.add_argument(
        "--experts", type=parse_experts, metavar="SPEC",
        help="routed experts of a mixture-of-experts model: 3:0-15,4:0-15 (experts 0 to 15 of blocks 3 and 4), *:0-3 "
        "(of every block), all, none, or auto. Alone: host these experts (auto: as many as fit, where they are needed "
        "most), and no blocks. With --blocks: of the experts of these blocks only these (auto: as many as fit beside "
        "2048 positions of KV cache or --kv-tokens, those first that are asked for most); the others are computed by "
        "servers that host them (default: all of the blocks' own)",
    )  # fmt: skip
    what.add_argument(
        "--role", choices=("blocks", "experts"),
        help="host blocks, or only experts, as many as fit and where they are needed most (default: blocks, unless "
        "--experts is given alone)",
    )  # fmt: skip
    what.add_argument(
        "--experts-deadline", type=_seconds, default=30.0, metavar="S",
        help="let a step wait so long for experts that nobody hosts at the moment (default: 30)",
    )  # fmt: skip
    what.add_argument("--revision", help="branch, tag or commit on the Hub")
    what.add_argument("--allow-untested-family", action="store_true", help="host families that no test covers")
    machine = parser.add_argument_group("what to give")
    machine.add_argument(
        "--memory",
        type=parse_size,
        metavar="SIZE",
        help="use at most this much, e.g. 12GiB (default: 80%% of what is free)",
    )
    machine.add_argument(
        "--kv-tokens",
        type=_positive,
        metavar="N",
        help="positions of KV cache to offer (default: what fits, up to 65536)",
    )
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, … (default: auto)")
    machine.add_argument("--dtype", choices=_DTYPES, default="auto", help="precision (default: that of the checkpoint)")
    machine.add_argument(
        "--quantize",
        choices=SCHEMES,
        help="hold the weights in 8 or 4 bits: faster, more blocks fit, less exact; int4 is for CPUs, nf4 for GPUs; "
        "clients must ask for it (default: no)",
    )
    machine.add_argument(
        "--offload",
        action="store_true",
        help="host more blocks than fit: as many as fit stay in memory, the others are read from disk at every step. "
        "That is slow (how slow is measured, and announced), so it is for blocks that too few others host, and for an "
        "SSD. The first start writes those blocks, ready to compute with, to ~/.cache/swarm/offload or "
        "$SWARM_HOME/offload: as much as they would take in memory, so --dtype bfloat16 and --quantize int8 make steps "
        "faster. One thread more than --threads reads (default: no)",
    )
    machine.add_argument("--threads", type=_positive, metavar="N", help="CPU threads to compute with")
    machine.add_argument(
        "--measure-again",
        action="store_true",
        help="measure this machine's speed even if it is known from a start in the last week",
    )
    machine.add_argument(
        "--no-prompt-reuse",
        dest="reuses_prompts",
        action="store_false",
        help="compute every prompt anew: then nobody can tell by the time it takes that somebody else began alike",
    )
    machine.add_argument("--max-sessions", type=_positive, default=256, metavar="N", help="(default: 256)")
    network = parser.add_argument_group("network")
    network.add_argument(
        "--initial-peers",
        nargs="+",
        default=[],
        metavar="ADDRESS",
        help="peers to join through (default: begin a new swarm)",
    )
    network.add_argument("--host", default="0.0.0.0", help="IP address to listen on (default: all)")
    network.add_argument("--port", type=int, default=0, help="port to listen on, TCP and QUIC (default: any)")
    network.add_argument(
        "--announce", nargs="+", default=[], metavar="ADDRESS", help="tell others these addresses instead"
    )
    network.add_argument(
        "--private-network", action="store_true", help="do not open the router's NAT, do not use relays"
    )
    network.add_argument(
        "--identity", type=Path, metavar="FILE", help="key file, made if missing: keeps the peer id over restarts"
    )
    network.add_argument(
        "--public-name", default="", metavar="NAME", help="be called so on public pages (default: anonymous)"
    )
    network.add_argument(
        "--drain-timeout",
        type=float,
        default=10.0,
        metavar="S",
        help="when leaving, wait so long for sessions to move (default: 10)",
    )
    _add_moving_arguments(parser)
    add_output_arguments(parser)
    return parser


def _add_moving_arguments(parser: argparse.ArgumentParser) -> None:
    usual = ServerSettings("")
    moving = parser.add_argument_group(
        "moving (with --blocks auto, or --role experts)",
        "The server moves to other blocks when these have no server, or a single one, or are the slowest by far. Its "
        "sessions go on elsewhere, and it never leaves blocks that nobody else serves. Where less will do, it hosts "
        "another part of what it has in memory (unless --num-blocks says how many). Not with --offload. A server of "
        "experts that chose its own takes over experts that nobody hosts any more, in place of some that others host.",
    )
    moving.add_argument(
        "--no-rebalance", dest="rebalances", action="store_false", help="stay with the blocks that were chosen first"
    )
    for name, default, meaning in (
        ("rebalance-every", usual.rebalance_interval_s, "look so often whether to move, give or take a half"),
        ("claim-wait", usual.claim_wait_s, "let others know of a move for so long before it begins"),
        ("settle-wait", usual.settle_wait_s, "look so long who else joins, before loading"),
        ("move-cost", usual.move_policy.away_s, "a move that makes the swarm faster is taken to last so long"),
        ("move-horizon", usual.move_policy.horizon_s, "and must have paid within so long"),
    ):
        moving.add_argument(
            f"--{name}", type=_seconds, default=default, metavar="S", help=f"{meaning} (default: {default:g})"
        )


def parse_blocks(text: str) -> tuple[int, int] | None:
    """``"0:15"`` → ``(0, 15)``; ``"auto"`` → None."""
    if text == "auto":
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a span; write A:B with A < B, such as 0:15, or auto")
    return int(match[1]), int(match[2])


def parse_experts(text: str) -> WantedExperts:
    """See :meth:`WantedExperts.parse`."""
    try:
        return WantedExperts.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_size(text: str) -> int:
    """``"12GiB"``, ``"800M"``, ``"1.5 GB"`` → bytes (K, M, G count in 1024s)."""
    match = re.fullmatch(r"([\d.]+)\s*([KMGT]?)i?B?", text.strip(), re.IGNORECASE)
    try:
        if match is None:
            raise ValueError
        return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write e.g. 12GiB or 800MiB") from None


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return seconds


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
