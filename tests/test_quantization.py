"""Weights in 8 bits: close to what they were, the same in any batch, and used only by clients who want them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUESTION, SmolLM2
from test_families import logits_through_spans, spans_of, steps_of
from tiny_models import save_tiny_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from swarm.commands import main, server
from swarm.commands.local_swarm import LocalSwarm
from swarm.errors import NoRoute
from swarm.models import load_span, open_checkpoint
from swarm.models.packed_linear import LinearWithCopy
from swarm.models.quantization import SCHEMES, bytes_per_weight, int4, int8, nf4, quantize_linears, quantized_head
from swarm.models.quantization.kernels import works
from swarm.models.together import way_together
from swarm.models.weight_layout import lay_out_span
from swarm.server.preparation import _check_quantization, prepare
from swarm.server.settings import ServerSettings

WORST = {"int8": 0.01, "nf4": 0.12, "int4": 0.1}
"""Relative error of one layer's output."""
AMPLIFIED = {"int8": 0.1, "nf4": 0.9, "int4": 0.9}
"""And of the logits of a random model, whose layers amplify noise."""
CUT = {"int8": 1e-5, "nf4": 0.05, "int4": 0.05}
"""What logits may differ in two spans from those in one. Where a kernel rounds its inputs to bfloat16, the last bit of
a float32 hidden state, which depends on where in memory it lies, can decide to which side."""


def linear(inputs: int, outputs: int, *, bias: bool = False, seed: int = 0) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)


def quantized(layer: nn.Module, scheme: str) -> nn.Module:
    holder = nn.ModuleDict({"layer": layer})
    quantize_linears(holder, scheme)
    return holder["layer"]


def states(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantized_layer_comes_close(scheme: str, bias: bool, dtype: torch.dtype) -> None:
    layer, hidden = linear(128, 64, bias=bias), states(2, 3, 128)
    expected = layer(hidden)
    found = quantized(layer.to(dtype), scheme)(hidden.to(dtype))
    assert found.dtype == dtype and found.shape == expected.shape
    assert (found.float() - expected).norm() < (WORST[scheme] + (dtype != torch.float32) * 0.02) * expected.norm()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_quantized_layer_takes_the_bytes_that_the_plan_counts(scheme: str) -> None:
    layer = quantized(linear(512, 256), scheme)
    held = sum(held.numel() * held.element_size() for held in (*layer.parameters(), *layer.buffers()))
    assert held == pytest.approx(bytes_per_weight(scheme, torch.float32) * 512 * 256, rel=0.02)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rows", [1, 2, 7, 64, 300])
def test_a_row_is_the_same_in_whatever_batch_it_comes(scheme: str, rows: int) -> None:
    layer, hidden = quantized(linear(192, 96), scheme), states(rows, 192)
    together = layer(hidden)
    for row in range(rows):
        alone = layer(hidden[row : row + 1])
        if scheme == "int8":
            assert torch.equal(alone, together[row : row + 1])
        else:
            torch.testing.assert_close(alone, together[row : row + 1], rtol=0, atol=0.01 * float(alone.abs().max()))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("inputs, outputs", [(1, 1), (31, 5), (100, 40), (65, 129)])
def test_odd_shapes(scheme: str, inputs: int, outputs: int) -> None:
    layer, hidden = linear(inputs, outputs, bias=True), states(3, inputs)
    expected = layer(hidden)
    found = quantized(layer, scheme)(hidden)
    assert found.shape == expected.shape
    assert (found - expected).norm() < 2 * WORST[scheme] * expected.norm()


@pytest.mark.parametrize("scheme, module", [("int8", int8), ("nf4", nf4), ("int4", int4)])
def test_all_kernels_that_work_here_mean_the_same_and_give_back_their_levels(scheme: str, module: Any) -> None:
    trial = module.trial((192, 128), torch.device("cpu"))
    candidates = [*module.KERNELS, *getattr(module, "CUDA_KERNELS", ())]
    assert sum(works(kernel, trial) for kernel in candidates) >= 2
    for kernel in candidates:
        restored = kernel.restore(*kernel.arrange(trial.levels))
        assert all(torch.equal(getattr(restored, name), held) for name, held in vars(trial.levels).items())


def test_one_large_number_does_not_drown_the_others_of_its_row() -> None:
    layer, hidden = linear(128, 64), states(1, 128)
    hidden[0, 7] = 300
    layer.weight[:, 7] = 0
    expected = layer(hidden)
    assert (quantized(layer, "int8")(hidden) - expected).norm() < WORST["int8"] * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_quantized_span_keeps_its_precision(scheme: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path)
    span = load_span(open_checkpoint(tmp_path), 0, 2, dtype=dtype, quantization=scheme)
    assert span.dtype == dtype
    lay_out_span(span, 64)
    assert span.forward(states(1, 3, 64).to(dtype), span.new_cache()).dtype == dtype


def test_layers_that_share_their_input_do_not_mistake_it() -> None:
    seeds = {"query": 0, "key": 5, "down": 6}
    holder = nn.ModuleDict({name: linear(64, 32, seed=seed) for name, seed in seeds.items()})
    alone = {name: quantized(linear(64, 32, seed=seed), "int8") for name, seed in seeds.items()}
    quantize_linears(holder, "int8")
    one, other = states(2, 64), states(2, 64, seed=2)
    for name, hidden in [("query", one), ("key", one), ("down", other), ("query", other), ("query", one)]:
        assert torch.equal(holder[name](hidden), alone[name](hidden))


def test_weights_of_zero_and_rows_of_zero_stay_zero() -> None:
    layer = linear(64, 32)
    layer.weight[3] = 0
    for scheme in SCHEMES:
        output = quantized(layer, scheme)(torch.cat([torch.zeros(1, 64), states(1, 64)]))
        assert output.isfinite().all()
        assert output[0].abs().max() == 0 and output[:, 3].abs().max() == 0


def test_the_linear_layers_of_gpt2_lie_the_other_way_round() -> None:
    layer = Conv1D(96, 64).requires_grad_(False)
    hidden = states(2, 64)
    expected = layer(hidden)
    assert (quantized(layer, "int8")(hidden) - expected).norm() < WORST["int8"] * expected.norm()


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "bloom", "falcon", "phi3", "stablelm"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_spans_of_a_quantized_model_join_where_the_whole_would_run(family: str, scheme: str, tmp_path: Path) -> None:
    save_tiny_model(family, tmp_path)
    checkpoint = open_checkpoint(tmp_path)

    def spans(*cuts: tuple[int, int]) -> list[Any]:
        return [load_span(checkpoint, *cut, dtype=torch.float32, quantization=scheme) for cut in cuts]

    steps = steps_of([9, 1, 1])
    exact = logits_through_spans(checkpoint, spans_of(checkpoint, [(0, 4)]), steps)
    whole = logits_through_spans(checkpoint, spans((0, 4)), steps)
    in_two = logits_through_spans(checkpoint, spans((0, 1), (1, 4)), steps)
    for one, two, unquantized in zip(whole, in_two, exact, strict=True):
        assert (two - one).norm() <= CUT[scheme] * one.norm()
        assert 0 < (one - unquantized).norm() < AMPLIFIED[scheme] * unquantized.norm()


def test_schemes_that_do_not_exist_or_do_not_suit_the_device_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for command, option in ((server.main, "--quantize"), (main.main, "--quantization")):
        with pytest.raises(SystemExit):
            command([*(["generate"] if command is main.main else []), "smollm2", option, "int9"])
        assert "invalid choice: 'int9' (choose from" in capsys.readouterr().err
    with pytest.raises(ValueError, match="int4 is not for this device: on cuda there is int8 and nf4"):
        _check_quantization("int4", open_checkpoint("smollm2"), torch.device("cuda"), offload=False)
    with pytest.raises(ValueError, match="int4 and --offload do not go together; int8 and it do"):
        _check_quantization("int4", open_checkpoint("smollm2"), torch.device("cpu"), offload=True)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantized_sessions_run_together(scheme: str, tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    span = load_span(checkpoint, 0, 4, dtype=torch.float32, quantization=scheme)
    assert way_together(span, checkpoint.hidden_size) is not None


def test_the_plan_counts_quantized_weights() -> None:
    plans = {
        scheme: prepare(ServerSettings("smollm2", blocks=(0, 15), quantization=scheme)).plan
        for scheme in (None, *SCHEMES)
    }
    exact = plans[None].weight_bytes
    for scheme, share in {"int8": 8 / 32, "nf4": 4.25 / 32, "int4": 5 / 32}.items():
        assert plans[scheme].weight_bytes / exact == pytest.approx(share, rel=0.04)


def test_experts_and_unknown_schemes_are_refused(tmp_path: Path) -> None:
    save_tiny_model("mixtral", tmp_path)
    with pytest.raises(ValueError, match="has experts, which cannot be quantized yet"):
        prepare(ServerSettings(str(tmp_path), quantization="int8"))
    with pytest.raises(ValueError, match="int9 is none of int8, nf4, int4"):
        prepare(ServerSettings("smollm2", quantization="int9"))


def test_only_clients_who_ask_for_quantized_weights_use_them(
    swarm: LocalSwarm, connect: Callable[..., Any], smollm2: SmolLM2
) -> None:
    for span in ("0:15", "15:30"):
        swarm.start_server("smollm2", "--blocks", span, "--threads", "1", "--quantize", "int8")
    options = {**smollm2.chat(QUESTION), "do_sample": False, "max_new_tokens": 16, "min_new_tokens": 16}
    with pytest.raises(NoRoute, match="computes in int8 weights, float32, this client wants float32"):
        connect("smollm2", deadline_s=0.5).generate(**options)
    ids = connect("smollm2", quantization="int8").generate(**options)
    local = copy.deepcopy(smollm2.whole)
    quantize_linears(local.model.layers, "int8")
    local.lm_head = LinearWithCopy(local.lm_head, quantized_head(local.lm_head))
    assert ids.tolist() == local.generate(**options).tolist()


@pytest.mark.parametrize("exponent", [-38, -6, 0, 6])
def test_kernels_of_torch_give_the_same_bits_and_the_compiled_one_comes_close(exponent: int) -> None:
    rows = states(5, 96) * 10.0**exponent
    rows[3] = 0
    levels = int8.Int8Levels.of(states(64, 96, seed=2))
    kernels = {kernel.name: kernel for kernel in int8.KERNELS}
    products = {name: kernels[name].multiply(rows, *kernels[name].arrange(levels)) for name in kernels}
    assert {"rows", "columns", "floats", "panels"} < products.keys()
    for name in products.keys() - {"packed", "panels"}:  # oneDNN rounds in an order of its own
        assert torch.equal(products[name], products["rows"]), name
    largest = products["rows"].abs().amax(dim=1, keepdim=True)
    assert ((products["panels"] - products["rows"]).abs() <= 1e-6 * largest).all()
