"""The fastest kernel that works is used, and remembered; nothing that lies in the cache can change what is computed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from swarm.models import choices
from swarm.models.quantization.kernels import Trial, decide, fastest, works

SHAPE = (64, 128)
CPU = torch.device("cpu")


class Float:
    """A kernel for weights that are no levels at all, and how often it was called."""

    def __init__(self, name: str, factor: float = 1.0, repetitions: int = 1, error: Exception | None = None) -> None:
        self.name, self.calls = name, 0
        self._factor, self._repetitions, self._error = factor, repetitions, error

    def arrange(self, levels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (levels,)

    def restore(self, *arranged: torch.Tensor) -> torch.Tensor:
        return arranged[0]

    def multiply(self, rows: torch.Tensor, *arranged: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self._error is not None:
            raise self._error
        for _ in range(self._repetitions):
            product = rows @ arranged[0].t()
        return product * self._factor


def trial() -> Trial[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(*SHAPE, generator=random)
    few, many = torch.randn(1, 128, generator=random), torch.randn(32, 128, generator=random)
    return Trial(weight, [few], many, lambda rows: rows.double() @ weight.double().t(), 1e-5)


def choose(*candidates: Float) -> str:
    return fastest("test", SHAPE, CPU, candidates, trial).name


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and a process that has chosen nothing."""
    monkeypatch.setenv("SWARM_HOME", str(tmp_path))
    monkeypatch.setattr(choices, "_chosen", {})
    yield tmp_path


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "_chosen", {})


def test_of_equals_the_first_is_taken() -> None:
    assert decide({"one": [1.0, 1.0], "two": [0.99, 0.99]}) == "one"
    assert decide({"one": [1.0, 1.0], "two": [0.5, 1.9]}) == "one"
    assert decide({"one": [1.0, 1.0], "two": [0.5, 1.1], "three": [0.1, 1.0]}) == "three"


def test_a_favourite_may_take_twice_as_long() -> None:
    times = {"favourite": [1.9, 1.9], "one": [1.0, 1.0], "two": [1.5, 1.5]}
    assert decide(times) == "one" and decide(times, "favourite") == "favourite"
    assert decide({**times, "favourite": [2.1, 2.1]}, "favourite") == "one"
    assert decide(times, "does not work here") == "one"


def test_the_fastest_that_works_is_chosen(home: Path) -> None:
    wrong, broken = Float("wrong", factor=1.1), Float("broken", error=NotImplementedError("no such instruction"))
    assert choose(wrong, broken, Float("slow", repetitions=50), Float("fast")) == "fast"
    assert not works(wrong, trial()) and not works(broken, trial())


def test_where_none_works_that_is_an_error(home: Path) -> None:
    with pytest.raises(RuntimeError, match="no kernel for test weights works on"):
        choose(Float("wrong", factor=1.1))


def test_a_choice_is_measured_once_and_outlives_the_process(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(Float("slow", repetitions=50), Float("fast"))
    for _ in range(2):
        slow, fast = Float("slow", repetitions=50), Float("fast")
        assert choose(slow, fast) == "fast"
        assert slow.calls == fast.calls == 0
        new_process(monkeypatch)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '"fast"',
        '{"choice": "slow"}',
        '{"situation": {"scheme": "test"}, "choice": "slow"}',
        "\0" * 99,
    ],
)
def test_damaged_files_are_ignored(home: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    choose(Float("slow", repetitions=50), Float("fast"))
    (file,) = (home / "choices").iterdir()
    file.write_text(text)
    new_process(monkeypatch)
    assert choose(Float("slow", repetitions=50), Float("fast")) == "fast"
    assert json.loads(file.read_text())["choice"] == "fast"


@pytest.mark.parametrize("name", ["nobody", 3, None, ["fast"]])
def test_files_that_name_no_candidate_are_ignored(home: Path, monkeypatch: pytest.MonkeyPatch, name: object) -> None:
    choose(Float("slow", repetitions=50), Float("fast"))
    (file,) = (home / "choices").iterdir()
    file.write_text(json.dumps({**json.loads(file.read_text()), "choice": name}))
    new_process(monkeypatch)
    assert choose(Float("slow", repetitions=50), Float("fast")) == "fast"


def test_another_number_of_threads_is_another_situation(home: Path) -> None:
    choose(Float("slow", repetitions=50), Float("fast"))
    torch.set_num_threads(2)
    try:
        choose(Float("slow", repetitions=50), Float("fast"))
    finally:
        torch.set_num_threads(1)
    assert len(list((home / "choices").iterdir())) == 2
