"""Blocks that are read from disk at every step compute what blocks in memory do, within the memory that was given."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import QUESTION, SmolLM2
from test_families import logits_through_spans, steps_of
from tiny_models import BLOCKS, WINDOW, save_tiny_model
from watched_memory import watching_memory

from swarm.commands.local_swarm import LocalSwarm
from swarm.errors import DiskError, InsufficientMemory
from swarm.models import Span, load_span, open_checkpoint
from swarm.models.block_files import BlockFile, BlockKey, open_block, write_block
from swarm.models.compiled_blocks import CompiledBlocks
from swarm.models.fast_blocks import fuse_projections
from swarm.models.file_form import FileForm
from swarm.models.offload import spread
from swarm.models.paged_cache import PagePool
from swarm.models.quantization import int8
from swarm.models.together import way_together
from swarm.models.weight_layout import Layout, lay_out_span
from swarm.server.plan import MIB, PROCESS_BYTES, WORKING_BYTES, make_plan
from swarm.server.preparation import prepare
from swarm.server.settings import ServerSettings
from swarm.server.throughput import measure_compute

FAMILIES = [
    "llama", "llama-tied", "gemma3_text", "gpt2", "bloom", "falcon-alibi", "phi3-longrope", "mixtral", "qwen2_moe",
    "deepseek_v3", "gpt_oss",
]  # fmt: skip


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own, but for what was compiled and timed: that is the machine's, and takes long."""
    of_machine, own = Path(os.environ["SWARM_HOME"]), tmp_path / "home"
    own.mkdir()
    for name in ("native", "choices"):
        (of_machine / name).mkdir(parents=True, exist_ok=True)
        (own / name).symlink_to(of_machine / name)
    monkeypatch.setenv("SWARM_HOME", str(own))
    return own


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A tiny random llama."""
    save_tiny_model("llama", tmp_path / "tiny")
    return tmp_path / "tiny"


def load(directory: Path | str, offloaded: int, start: int = 0, end: int = BLOCKS, **options: Any) -> Span:
    """A span as a server has it."""
    checkpoint = open_checkpoint(directory)
    span = load_span(checkpoint, start, end, dtype=torch.float32, offloaded_blocks=offloaded, **options)
    return laid_out(span, checkpoint.hidden_size, options.get("quantization"))


def laid_out(span: Span, hidden_size: int, quantization: str | None = None) -> Span:
    """Kernels add up in another order if weights do not lie in memory as they do in files."""
    staying = list(span.staying_layers())
    form = FileForm.best_for(staying, span.dtype, span.device, quantization)
    for layer in staying if quantization is None else ():
        form.give_to(layer)
    lay_out_span(span, hidden_size)
    return span


def files_in(home: Path) -> list[Path]:
    return sorted(path for path in (home / "offload").glob("*"))


def outputs(span: Span, steps: int = 4, seed: int = 0, hidden_size: int = 64) -> list[torch.Tensor]:
    """Of a prompt, and of single positions after it."""
    random, cache = torch.Generator().manual_seed(seed), span.new_cache()
    lengths = [5] + [1] * steps
    return [span.forward(torch.randn(1, length, hidden_size, generator=random), cache) for length in lengths]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("first_start", [True, False])
def test_logits_step_by_step_are_those_of_blocks_in_memory(
    family: str, first_start: bool, tmp_path: Path, home: Path
) -> None:
    save_tiny_model(family, tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    steps = steps_of([3, WINDOW, 1, 1, 1, 4, 1])
    if not first_start:
        load(tmp_path / "model", 3)
    expected = logits_through_spans(checkpoint, [load(tmp_path / "model", 0)], steps)
    assert_same(logits_through_spans(checkpoint, [load(tmp_path / "model", 3)], steps), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
@pytest.mark.parametrize("first_start", [True, False])
def test_8_bit_weights_can_be_offloaded(
    family: str, first_start: bool, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_files = [one for one in int8.KERNELS if one.name == ("panels" if int8.panels_in_files() else "rows")]
    monkeypatch.setattr(int8, "KERNELS", in_files)  # another may be faster in memory, and differ in the last bits
    save_tiny_model(family, tmp_path / "model")
    if not first_start:
        load(tmp_path / "model", 3, quantization="int8")
    found = outputs(load(tmp_path / "model", 3, quantization="int8"))
    assert_same(found, outputs(load(tmp_path / "model", 0, quantization="int8")))
    exact = load(tmp_path / "model", 3)
    assert len(files_in(home)) == 6  # both precisions have files of their own
    assert not torch.equal(outputs(exact)[0], found[0])


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_blocks_on_disk_run_in_compiled_code_too(quantization: str | None, tiny: Path, home: Path) -> None:
    found = []
    for offloaded in (0, 3):
        span = load_span(open_checkpoint(tiny), 0, 4, dtype=torch.float32, quantization=quantization,
                         offloaded_blocks=offloaded)  # fmt: skip
        form = FileForm.best_for(list(span.staying_layers()), span.dtype, span.device, quantization)
        assert form.for_compiled_code
        fuse_projections(span)
        lay_out_span(span, 64, lambda linears: {linear.weight.shape: Layout.PANELS for linear in linears})
        way = CompiledBlocks.of(span)
        assert way is not None and way_together(span, 64, way) is way
        cache = PagePool.for_span(span, 64, pages=2).new_cache(0, 4, 24)
        random = torch.Generator().manual_seed(0)
        for part in (span, span, span.part(1, 3)):
            cache.roll_back(5)
            found.append(way.forward(part, [(torch.randn(1, 5, 64, generator=random), cache, None)])[0])
    assert_same(found[:3], found[3:])


def test_bfloat16_blocks_take_half_the_disk(tiny: Path, home: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    spans = [load_span(checkpoint, 0, 4, dtype=torch.bfloat16, offloaded_blocks=count) for count in (0, 3)]
    for span in spans:
        lay_out_span(span, checkpoint.hidden_size)
    hidden_states = torch.randn(1, 3, 64).bfloat16()
    assert_same(*([span.forward(hidden_states, span.new_cache())] for span in spans))
    load(tiny, 3)
    sizes = [path.stat().st_size for path in files_in(home) if "bfloat16" in path.name]
    full = [path.stat().st_size for path in files_in(home) if "float32" in path.name]
    assert sum(sizes) < 0.6 * sum(full)


def test_transposed_weights_are_streamed_as_they_lie(home: Path) -> None:
    options: dict[str, Any] = {"dtype": torch.float32, "start": 0, "end": 8}
    checkpoint = open_checkpoint("smollm2")
    expected = outputs(load_span(checkpoint, **options), hidden_size=576)
    first = load_span(checkpoint, **options, offloaded_blocks=6)
    for span in (first, load_span(checkpoint, **options, offloaded_blocks=6)):
        lay_out_span(span, 576)
        for found, wanted in zip(outputs(span, hidden_size=576), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("transposed", [set(), {torch.Size([6, 4])}])
def test_a_file_gives_back_every_tensor_in_the_order_asked_for(transposed: set[torch.Size], home: Path) -> None:
    tensors = {
        "matrix": torch.randn(6, 4), "experts": torch.randn(3, 6, 4), "bias": torch.randn(5).bfloat16(),
        "levels": torch.randint(-127, 128, (6, 4), dtype=torch.int8), "scalar": torch.tensor(2.5),
        "none": torch.empty(0),
    }  # fmt: skip
    key = BlockKey("a" * 64, "b" * 64, "torch.float32", None)
    assert open_block(key) is None
    write_block(key, tensors, transposed)
    file = open_block(key)
    assert file is not None and files_in(home) == [key.path]
    file.bring()
    views = file.views_in(file.memory)
    assert views.keys() == tensors.keys()
    assert all(torch.equal(views[name], tensors[name]) for name in tensors)
    assert views["matrix"].is_contiguous() == (not transposed)


def test_blocks_are_in_memory_only_while_they_are_needed(tiny: Path, home: Path) -> None:
    span = load(tiny, 3)
    assert span.offloaded.keys() == {1, 2, 3} and span.part(0, 2).offloaded.keys() == {1}
    whole = load(tiny, 0)
    assert not whole.offloaded
    assert span.weight_bytes * 4 == whole.weight_bytes


@pytest.mark.parametrize("window", [1, 2, 3])
def test_parts_of_a_span_in_any_order_give_what_they_give_in_memory(window: int, tiny: Path, home: Path) -> None:
    """Other sessions run other blocks than those that were expected next."""
    span, whole = load(tiny, 3, window_blocks=window), load(tiny, 0)
    parts = [(0, 4), (1, 2), (2, 4), (0, 1), (0, 4), (3, 4), (3, 4), (1, 3), (0, 2), (0, 4)]
    for seed, part in enumerate(parts):
        assert_same(outputs(span.part(*part), 2, seed), outputs(whole.part(*part), 2, seed))


def test_a_step_that_fails_half_way_leaves_the_blocks_in_order(tiny: Path, home: Path) -> None:
    span, whole = load(tiny, 3), load(tiny, 0)
    cache = span.new_cache()
    with pytest.raises(RuntimeError, match="broken on purpose"):
        hook = span.layers[2].register_forward_pre_hook(_fail)
        try:
            span.forward(torch.randn(1, 3, 64), cache)
        finally:
            hook.remove()
    assert_same(outputs(span), outputs(whole))


def _fail(*_: object) -> None:
    raise RuntimeError("broken on purpose")


def test_sessions_together_read_each_block_once(tiny: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    span, whole = load(tiny, 3), load(tiny, 0)
    way = way_together(load(tiny, 3), 64)
    assert way is not None
    bring, brought = BlockFile.bring, []

    def counted(file: BlockFile) -> None:
        brought.append(file)
        bring(file)

    def run(over: Span) -> list[torch.Tensor]:
        pool = PagePool.for_span(over, 64, pages=8)
        caches = [pool.new_cache(over.start, over.end, 16) for _ in range(8)]
        for seed, cache in enumerate(caches):
            cache.begin(1, 3 + seed)
            over.forward(torch.randn(1, 3 + seed, 64, generator=torch.Generator().manual_seed(seed)), cache)
        return way.forward(over, [(torch.ones(1, 1, 64), cache, None) for cache in caches])

    monkeypatch.setattr(BlockFile, "bring", counted)
    assert_same(run(span), run(whole))
    passes = 1 + 8 + 1  # to see what layers cache, prompts, tokens
    assert 3 * passes <= len(brought) <= 3 * passes + 2, "and those that wait for the next step"


@pytest.mark.parametrize("count", range(31))
def test_blocks_that_stay_are_spread_among_the_others(count: int) -> None:
    chosen = spread(5, 35, count)
    assert len(chosen) == count and chosen <= set(range(5, 35))
    for length in (5, 10, 15):
        windows = [sum(block in chosen for block in range(first, first + length)) for first in range(5, 36 - length)]
        assert max(windows) - min(windows) <= 1


def test_the_next_start_uses_the_files_and_reads_no_offloaded_block_of_the_checkpoint(tiny: Path, home: Path) -> None:
    expected = outputs(load(tiny, 3))
    before = {path: path.stat().st_mtime_ns for path in files_in(home)}
    assert len(before) == 3
    checkpoint = open_checkpoint(tiny)
    read: list[str] = []
    lazy_state_dict = checkpoint.files.lazy_state_dict

    def listening(names: Any, model: Any) -> dict[str, Any]:
        read.extend(names)
        return lazy_state_dict(names, model)

    checkpoint.files.lazy_state_dict = listening  # type: ignore[method-assign]
    elements: list[int] = []
    span = load_span(checkpoint, 0, 4, dtype=torch.float32, offloaded_blocks=3, on_elements=elements.append)
    assert_same(outputs(laid_out(span, checkpoint.hidden_size)), expected)
    assert {path: path.stat().st_mtime_ns for path in files_in(home)} == before
    assert read and all(name.startswith("model.layers.0.") for name in read)
    assert sum(elements) == sum(checkpoint.block_elements(block) for block in range(4))


def test_other_spans_of_the_model_use_the_same_files(tiny: Path, home: Path) -> None:
    load(tiny, 3)
    before = set(files_in(home))
    load(tiny, 2, start=1)
    assert set(files_in(home)) == before


def test_the_same_model_in_another_place_uses_the_same_files(tiny: Path, tmp_path: Path, home: Path) -> None:
    load(tiny, 3)
    before = set(files_in(home))
    shutil.copytree(tiny, tmp_path / "copy")
    load(tmp_path / "copy", 3)
    assert set(files_in(home)) == before


def test_a_gguf_file_has_the_same_blocks_on_every_start(home: Path) -> None:
    first, second = open_checkpoint("smollm2"), open_checkpoint("smollm2")  # the second finds its configuration kept
    assert first.config_digest == second.config_digest and first.block_digest(3) == second.block_digest(3)


def damage_at(position: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[int(position * (len(data) - 1))] ^= 1
        path.write_bytes(data)

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        damage_at(0), damage_at(0.005), damage_at(0.5), damage_at(1),
        lambda path: os.truncate(path, 5000), lambda path: os.truncate(path, 0), lambda path: os.truncate(path, 10),
        lambda path: path.write_bytes(b"x" * 10_000),
    ],
    ids=["magic", "header", "weights", "end", "cut short", "empty", "only magic", "something else"],
)  # fmt: skip
def test_a_damaged_file_is_made_anew(
    damage: Callable[[Path], None], tiny: Path, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = outputs(load(tiny, 3))
    good = {path: path.read_bytes() for path in files_in(home)}
    victim = next(iter(good))
    victim.chmod(0o644)
    damage(victim)
    assert_same(outputs(load(tiny, 3)), expected)
    assert f"{victim} is damaged, and is made anew" in caplog.text
    assert {path: path.read_bytes() for path in files_in(home)} == good


def test_a_file_that_was_swapped_with_another_blocks_is_not_used(tiny: Path, home: Path) -> None:
    expected = outputs(load(tiny, 3))
    one, other, _ = files_in(home)
    one.chmod(0o644)
    other.chmod(0o644)
    contents = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(contents)
    assert_same(outputs(load(tiny, 3)), expected)


def test_a_file_that_cannot_be_read_fails_the_step_and_its_return_heals_it(tiny: Path, home: Path) -> None:
    span = load(tiny, 3)
    expected = outputs(span)
    digest = open_checkpoint(tiny).block_digest(3)  # blocks 1 and 2 are in memory, for the next step
    (victim,) = (path for path in files_in(home) if path.name.startswith(digest[:16]))
    data = victim.read_bytes()
    victim.chmod(0o644)
    os.truncate(victim, 5000)
    for _ in range(2):
        with pytest.raises(DiskError, match=rf"{victim.name} cannot be read any more .* Start the server again"):
            outputs(span)
    victim.write_bytes(data)
    assert_same(outputs(span), expected)


def test_files_that_are_removed_or_made_anew_while_in_use_do_not_matter(tiny: Path, home: Path) -> None:
    span = load(tiny, 3)
    expected = outputs(span)
    for path in files_in(home):
        assert path.stat().st_mode & 0o222 == 0, "nobody changes one by mistake"
        path.unlink()
    assert_same(outputs(span), expected)
    load(tiny, 3)
    assert_same(outputs(span), expected)


def test_other_weights_and_another_configuration_have_other_files(tiny: Path, tmp_path: Path, home: Path) -> None:
    load(tiny, 3)
    save_tiny_model("llama", tmp_path / "other", seed=1)
    load(tmp_path / "other", 3)
    assert len(files_in(home)) == 6
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    load(tiny, 3)
    assert len(files_in(home)) == 9


def test_a_full_disk_is_said_before_anything_is_written(
    tiny: Path, full_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWARM_HOME", str(full_disk))
    with pytest.raises(DiskError, match=r"blocks to offload need 0\.\d MiB in .*full-disk/offload, where only .* free"):
        load(tiny, 3)
    assert [path for path in full_disk.rglob("*") if path.is_file()] == [full_disk / "filling"]


def test_a_disk_that_fills_up_meanwhile_leaves_nothing_behind(
    tiny: Path, full_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others write, too: what was free a moment ago is not."""
    (full_disk / "filling").unlink()  # now there is room for one block
    monkeypatch.setenv("SWARM_HOME", str(full_disk))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    with pytest.raises(DiskError, match=r"do not fit in .*full-disk/offload: No space left on device\. Make room"):
        load(tiny, 3, quantization="int8")
    assert files_in(full_disk) == []


def test_a_directory_that_cannot_be_written_to_is_said(tiny: Path, home: Path) -> None:
    (home / "offload").write_text("a file where a directory should be")
    with pytest.raises(DiskError, match="Set SWARM_HOME"):
        load(tiny, 3)


def test_what_a_killed_process_left_is_removed_when_it_is_old(tiny: Path, home: Path) -> None:
    load(tiny, 1)
    written = files_in(home)[0]
    old, new = (written.with_name(f".{written.name}.{name}") for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half of it")
    os.utime(old, (time.time() - 7200,) * 2)
    load(tiny, 3)
    assert not old.exists() and new.exists()


def _load_and_run(directory: str, start: Any, results: Any) -> None:
    torch.set_num_threads(1)
    start.wait()
    results.put([output.tolist() for output in outputs(load(directory, 3))])


def test_two_servers_that_start_at_once_share_a_cache(tiny: Path, home: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    start, results = spawn.Barrier(2), spawn.Queue()
    processes = [spawn.Process(target=_load_and_run, args=(str(tiny), start, results)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    expected = [output.tolist() for output in outputs(load(tiny, 0))]
    assert found == [expected, expected]
    assert len(files_in(home)) == 3 and not any(path.name.startswith(".") for path in files_in(home))


def test_the_reading_thread_ends_with_the_span(tiny: Path, home: Path) -> None:
    span = load(tiny, 3)
    outputs(span)
    assert any(thread.name.startswith("offload") for thread in threading.enumerate())
    del span
    deadline = time.monotonic() + 10
    while any(thread.name.startswith("offload") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


LEAN = """
import sys
import torch
from swarm.server.preparation import open_checkpoint
from swarm.models import load_span
for scheme in (None, "int8"):
    span = load_span(open_checkpoint(sys.argv[1]), 0, 4, dtype=torch.float32, quantization=scheme, offloaded_blocks=3)
    span.forward(torch.ones(1, 3, 64), span.new_cache())
print(sorted({"torch._dynamo", "torch.distributed.tensor", "sympy", "scipy"} & sys.modules.keys()))
"""


def test_offloading_needs_no_compiler(tiny: Path, home: Path) -> None:
    """torch computes on the meta device, where layers without weights are made, with the help of 70 MB."""
    result = subprocess.run([sys.executable, "-c", LEAN, str(tiny)], capture_output=True, text=True, timeout=120)
    assert result.stdout == "[]\n", result.stderr


def test_the_announced_throughput_is_not_that_of_a_step_that_finds_the_window_full(
    tiny: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bring = BlockFile.bring

    def slow(file: BlockFile) -> None:
        time.sleep(0.02)
        bring(file)

    span = load(tiny, 3)
    monkeypatch.setattr(BlockFile, "bring", slow)
    outputs(span, 1)
    time.sleep(0.1)  # two blocks wait for the first step, which takes 20 ms then
    assert measure_compute(span, 64, None).decode_steps_per_s[1] < 1 / 0.055


PLAN = {"kv_bytes_per_block": 1024, "memory_from": "--memory", "kv_tokens": 1024}


def test_the_plan_keeps_as_many_blocks_as_fit_and_says_what_is_read() -> None:
    program = PROCESS_BYTES + WORKING_BYTES
    room = {"memory_bytes": program + 30 * MIB + 105 * MIB, "num_blocks": 30, **PLAN}
    plan = make_plan([10 * MIB] * 40, window_blocks=2, **room)
    assert (plan.num_blocks, plan.offloaded_blocks, plan.window_blocks) == (30, 22, 2)
    assert plan.weight_bytes == 100 * MIB and plan.offloaded_bytes == 220 * MIB
    assert any("8 blocks for good, room for 2 of the others at a time" in line for line in plan.lines())
    assert any("read every step" in line and "220.0 MiB   from disk: 22 blocks" in line for line in plan.lines())
    with pytest.raises(InsufficientMemory):
        make_plan([10 * MIB] * 40, **room)


def test_nothing_is_offloaded_if_all_fits() -> None:
    plan = make_plan([10 * MIB] * 4, 1024, 4096 * MIB, "--memory", blocks=(0, 4), window_blocks=2)
    assert plan == make_plan([10 * MIB] * 4, 1024, 4096 * MIB, "--memory", blocks=(0, 4))
    assert not any("read every step" in line for line in plan.lines())


def test_a_server_with_memory_for_a_third_gives_the_local_tokens_and_keeps_to_its_memory(
    swarm: LocalSwarm, connect: Callable[..., Any], smollm2: SmolLM2
) -> None:
    block_bytes, kv_tokens = 4 * smollm2.checkpoint.block_elements(0), 2048
    per_position = 4 * (30 * 2 * 3 * 64 + 2 * smollm2.checkpoint.hidden_size)
    allowed = PROCESS_BYTES + WORKING_BYTES + 10 * block_bytes + kv_tokens * per_position
    wish = ServerSettings("smollm2", blocks=(0, 30), kv_tokens=kv_tokens, memory_bytes=allowed, offload=True)
    assert prepare(wish).plan.offloaded_blocks == 22
    server = swarm.start_server(
        "smollm2", "--blocks", "0:30", "--threads", "1", "--offload", "--memory", str(allowed), "--kv-tokens", "2048",
        wait=False,
    )  # fmt: skip
    with watching_memory([server]) as highest:
        server.wait_until_ready()
        model = connect("smollm2")
        ids = model.generate(**smollm2.chat(QUESTION), do_sample=False, max_new_tokens=32, min_new_tokens=32)
    assert ids.tolist() == smollm2.greedy(QUESTION, 32).tolist()
    assert 10 * block_bytes < max(highest.values()) <= allowed
