"""What is compiled on this machine computes what it should; and what happens where nothing can be compiled."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny_model

from swarm.models import load_span, open_checkpoint
from swarm.models.compiled_blocks import CompiledBlocks
from swarm.models.fast_blocks import fuse_projections
from swarm.models.native import building, library, panels
from swarm.models.native.panels import PanelLinear, can_use_panels
from swarm.models.packed_linear import LinearWithCopy
from swarm.models.paged_cache import PagePool
from swarm.models.quantization import int4, int8
from swarm.models.quantization.kernels import Trial
from swarm.models.weight_layout import Layout, lay_out_span


def rows_of(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine on which nothing was compiled yet; it does it quickly, and badly."""
    monkeypatch.setattr(building, "_FLAGS", tuple("-O0" if flag == "-O3" else flag for flag in building._FLAGS))
    monkeypatch.setenv("SWARM_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    return tmp_path


@pytest.mark.parametrize("inputs, outputs", [(1, 1), (64, 32), (65, 33), (577, 100), (1536, 40)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [*range(1, 14), 40])
def test_a_layer_in_panels_computes_what_the_layer_does(inputs: int, outputs: int, bias: bool, count: int) -> None:
    linear = torch.nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    in_panels, rows = PanelLinear(linear.weight, linear.bias), rows_of(count, inputs)
    true = torch.nn.functional.linear(rows.double(), linear.weight.double(), linear.bias.double() if bias else None)
    error = (in_panels(rows) - true).norm() / true.norm()
    assert error < 3e-7 and in_panels(rows.view(1, count, inputs)).shape == (1, count, outputs)
    assert torch.equal(in_panels.dense(), linear.weight)


@pytest.mark.parametrize("outputs", [96, 100])
def test_a_row_is_the_same_with_any_others_and_any_number_of_threads(outputs: int) -> None:
    linear = PanelLinear(rows_of(outputs, 300), None)
    rows = rows_of(29, 300, seed=2)
    together = linear(rows)
    assert all(torch.equal(linear(rows[:count]), together[:count]) for count in range(1, 30))
    assert all(torch.equal(linear(rows[first:]), together[first:]) for first in range(29))
    torch.set_num_threads(2)
    try:
        assert torch.equal(linear(rows), together)
    finally:
        torch.set_num_threads(1)


def test_the_way_weights_come_changes_no_bit_and_is_measured_once(elsewhere: Path) -> None:
    fastest = library._fastest_fetching(panels.needed())
    (remembered,) = (elsewhere / "choices").glob("fetching-*.json")
    assert json.loads(remembered.read_text())["choice"] == fastest.value
    linear, rows = PanelLinear(rows_of(100, 577), None), rows_of(3, 577, seed=2)
    try:
        products = []
        for fetching in library.Fetching:
            panels.needed().fetch(fetching)
            products.append(linear(rows))
    finally:
        panels.needed().fetch(fastest)
    assert torch.equal(*products)


@pytest.mark.parametrize("module", [int8, int4])
@pytest.mark.parametrize("inputs", [32, 576, 1568])
def test_quantized_weights_in_panels_are_multiplied_exactly(module: Any, inputs: int) -> None:
    kernel, trial = kernel_of(module), trial_of(module, inputs)
    for rows in (*trial.few, trial.many):
        true = trial.product(rows)
        # 16-bit levels of rows: int8's true product counts them in, int4's does not.
        tolerance = 1e-6 if module is int8 else 1e-4
        assert (kernel.multiply(rows, *kernel.arrange(trial.levels)) - true).norm() < tolerance * true.norm()


@pytest.mark.parametrize("processor, needs", [("x86-64", "sse2"), ("haswell", "avx2"), ("skylake-avx512", "avx512bw")])
def test_code_for_other_processors_computes_the_same(
    processor: str,
    needs: str,
    elsewhere: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    if f" {needs} " not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this processor has no {needs}")
    monkeypatch.setattr(building, "_WAYS", ((f"-march={processor}", "-O1"),))
    compiled = library.Library(str(building.compiled_library()))
    linear, rows = PanelLinear(rows_of(100, 577), rows_of(100)), rows_of(37, 577, seed=2)
    quantized = [(kernel_of(module), trial_of(module, 576)) for module in (int8, int4)]
    blocks = blocks_of(tmp_path_factory.mktemp("model"))

    def everything() -> list[torch.Tensor]:
        multiplied = [kernel.multiply(trial.few[1], *kernel.arrange(trial.levels)) for kernel, trial in quantized]
        return [linear(rows), *multiplied, blocks()]

    here = everything()
    monkeypatch.setattr("swarm.models.native.panels.library", lambda: compiled)
    assert all(
        one is not other and (one - other).norm() < 2e-6 * one.norm()
        for one, other in zip(here, everything(), strict=True)
    )


def blocks_of(directory: Path) -> Callable[[], torch.Tensor]:
    """Runs blocks of a tiny model over a prompt in two pieces."""
    save_tiny_model("mistral", directory)
    checkpoint = open_checkpoint(directory)
    hidden = checkpoint.hidden_size
    span = load_span(checkpoint, 0, 2, dtype=torch.float32)
    fuse_projections(span)
    lay_out_span(span, hidden, lambda linears: {linear.weight.shape: Layout.PANELS for linear in linears})
    way, pool, prompt = CompiledBlocks.of(span), PagePool.for_span(span, hidden, pages=4), rows_of(1, 50, hidden)
    assert way is not None

    def run() -> torch.Tensor:
        cache = pool.new_cache(0, 2, 50)
        parts = [way.forward(span, [(piece, cache, None)])[0] for piece in prompt.split(30, dim=1)]
        cache.release()
        return torch.cat(parts, dim=1)

    return run


def kernel_of(module: Any) -> Any:
    return next(one for one in module.KERNELS if one.name == "panels")


def trial_of(module: Any, inputs: int) -> Trial[Any]:
    found: Trial[Any] = module.trial((128, inputs), torch.device("cpu"))
    return found


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_what_is_no_number_is_seen_and_stays_in_its_row(number: float) -> None:
    weight, rows = rows_of(64, 64), rows_of(3, 64, seed=2)
    kernels = [kernel_of(module) for module in (int8, int4)]
    arranged = [kernels[0].arrange(int8.Int8Levels.of(weight)), kernels[1].arrange(int4.Int4Levels.of(weight))]
    ways: list[Callable[[torch.Tensor], torch.Tensor]] = [
        PanelLinear(weight, None),
        *(lambda rows, way=way: way[0].multiply(rows, *way[1]) for way in zip(kernels, arranged, strict=True)),
    ]
    expected = [way(rows) for way in ways]
    rows[1, 5] = number
    for way, before in zip(ways, expected, strict=True):
        found = way(rows)
        assert not found[1].isfinite().any() and torch.equal(found[::2], before[::2])


def test_this_machine_compiles_it_once(elsewhere: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "swarm.models.native.building"):
        first = building.compiled_library()
        assert first is not None and first.parent == elsewhere / "native"
        assert building.compiled_library() == first
    assert caplog.text.count("compiling for this processor") == 1
    assert not list(first.parent.glob(".*"))  # nothing half made is left


def test_without_a_compiler_everything_works_in_another_way(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(elsewhere))
    monkeypatch.setattr(building.importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.INFO, "swarm.models.native.building"):
        assert building.compiled_library() is None
    assert "there is no C compiler here" in caplog.text
    layer = torch.nn.Linear(64, 64).requires_grad_(False)
    for scheme in (int8.Int8Linear, int4.Int4Linear):  # what was best with a compiler is remembered, and not tried
        scheme.quantize(layer.weight, layer.bias)
    for module in ("native.panels", "quantization.int8", "quantization.int4"):
        monkeypatch.setattr(f"swarm.models.{module}.library", lambda: None)
    assert not can_use_panels(torch.float32)
    for scheme in (int8.Int8Linear, int4.Int4Linear):
        quantized = scheme.quantize(layer.weight, layer.bias)
        assert quantized.panels() is None
        assert (quantized(rows_of(1, 64)) - layer(rows_of(1, 64))).norm() < 0.1 * layer(rows_of(1, 64)).norm()


def test_a_compiler_that_fails_is_not_the_last_that_is_tried(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = elsewhere / "broken"
    broken.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('no, I will not')\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    assert building.compiled_library() is not None
    monkeypatch.setenv("SWARM_HOME", str(elsewhere / "another"))
    monkeypatch.setenv("PATH", str(elsewhere))
    monkeypatch.setattr(building.importlib.util, "find_spec", lambda name: None)
    assert building.compiled_library() is None
    assert "no, I will not" in caplog.text


@pytest.mark.parametrize(
    "damage", [lambda content: content[:1000], lambda content: b"", lambda content: content[:-1] + b"?"]
)
def test_a_damaged_library_is_compiled_again(elsewhere: Path, damage: Callable[[bytes], bytes]) -> None:
    path = building.compiled_library()
    assert path is not None
    whole = path.read_bytes()
    path.unlink()  # what is in use is left alone
    path.write_bytes(damage(whole))
    assert building.compiled_library() == path and path.read_bytes() != damage(whole)
    assert isinstance(library.library.__wrapped__(), library.Library)


def test_a_home_that_cannot_be_written_to_is_said(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (elsewhere / "file").touch()
    monkeypatch.setenv("SWARM_HOME", str(elsewhere / "file"))
    assert building.compiled_library() is None
    assert "cannot be written to" in caplog.text


def test_it_can_be_switched_off(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWARM_NATIVE", "0")
    assert building.compiled_library() is None
    assert list(elsewhere.iterdir()) == []


def test_a_head_in_panels_follows_its_weights() -> None:
    head = torch.nn.Linear(64, 96, bias=False).requires_grad_(False)
    with_copy, rows = LinearWithCopy(head, PanelLinear(head.weight, None)), rows_of(2, 64)
    torch.testing.assert_close(with_copy(rows), head(rows), rtol=1e-5, atol=1e-5)
    head.weight.mul_(2)
    assert torch.equal(with_copy(rows), head(rows))
