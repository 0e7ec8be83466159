"""transformers starts faster with an index of its files, and is the same with any that it finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from swarm.transformers_index import from_json, to_json

INDEX = {
    "llama": {frozenset(): {"configuration_llama": {"LlamaConfig"}}, frozenset({"torch", "vision"}): {"x": {"B", "A"}}}
}


def names(home: Path, *before: str) -> set[str]:
    """What a new process finds in transformers, and from where it has two of its classes."""
    script = ";".join([*before, "import transformers", "print(transformers.LlamaForCausalLM.__module__)",
                       "print(transformers.AutoConfig.__module__)", "print(*dir(transformers))"])  # fmt: skip
    environment = {**os.environ, "SWARM_HOME": str(home)}
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True, timeout=120
    )
    return set(ended.stdout.split())


def test_transformers_is_the_same_with_an_index_without_one_and_with_a_damaged_one(tmp_path: Path) -> None:
    plain = names(tmp_path)
    assert "transformers.models.llama.modeling_llama" in plain and not list(tmp_path.iterdir())
    assert names(tmp_path, "import swarm") == plain
    (file,) = (tmp_path / "transformers").iterdir()
    written = file.read_text()
    assert names(tmp_path, "import swarm") == plain
    file.write_text(written[:-100])
    assert names(tmp_path, "import swarm") == plain
    assert file.read_text() == written


def test_the_index_that_was_kept_is_used(tmp_path: Path) -> None:
    names(tmp_path, "import swarm")
    (file,) = (tmp_path / "transformers").iterdir()
    index = from_json(json.loads(file.read_text()))
    index["llama"] = {frozenset(): {"configuration_llama": {"OnlyThis"}}}
    file.write_text(json.dumps(to_json(index)))
    script = "import swarm, transformers; transformers.LlamaConfig"
    environment = {**os.environ, "SWARM_HOME": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120)
    assert "has no attribute LlamaConfig" in ended.stderr


def test_an_index_comes_back_as_it_was() -> None:
    assert from_json(json.loads(json.dumps(to_json(INDEX)))) == INDEX


@pytest.mark.parametrize("pairs", [3, "ab", [["a"]], [["a", 3]], [["a", {"on": []}]], [[3, ["a"]]], [["a", [["b"]]]]])
def test_what_is_no_index_is_refused(pairs: object) -> None:
    with pytest.raises((TypeError, ValueError, KeyError)):
        from_json(pairs)
