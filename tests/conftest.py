"""What tests share: a private home for caches, the real model, and swarms of real processes."""

from __future__ import annotations

import copy
import functools
import inspect
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis  # noqa: F401  (CPython 3.11.7 cannot compile it as late as pytest's summary, where its plugin imports it)
import pytest
import torch
from in_lanes import PARTS, SHARED_HOME, taking_turns
from tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from warm_start import WarmLoopback

from swarm.cache_directory import alone_in, cache_directory, fill_directory_atomically
from swarm.client import AutoDistributedModelForCausalLM
from swarm.commands.local_swarm import LocalSwarm
from swarm.models import Checkpoint, open_checkpoint
from swarm.models.local import load_whole_model

QUESTION = "Write three sentences about the sea."


_LIVE_FIXTURES = {"swarm", "warm", "connect"}
_LIVE_NAMES = {"LocalSwarm", "Node", "Laboratory", "subprocess"}
"""What uses one of them starts processes, or opens sockets."""
_PATIENT_MODULES = {
    "test_chat_page", "test_commands", "test_docker", "test_expert_servers", "test_families_over_processes",
    "test_foresight", "test_forgery", "test_gateway", "test_generation", "test_health", "test_quantization",
}  # fmt: skip
"""Nothing in them is timed to a fraction of a second."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", choices=PARTS, help="run only a part: see tests/in_lanes.py")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Importing tests of another part takes seconds."""
    is_patient = collection_path.stem in _PATIENT_MODULES
    is_module = collection_path.name.startswith("test_")
    other = {"live": is_patient, "patient": is_module and not is_patient}
    return other.get(config.getoption("--part"), False) or None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part = config.getoption("--part")
    if part is not None:
        chosen = [item for item in items if _part(item) == part]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
        items[:] = chosen


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    if (home := os.environ.get(SHARED_HOME)) is None:
        return (yield)
    with taking_turns(Path(home), alone=item.get_closest_marker("quiet") is not None):
        return (yield)


def _part(item: pytest.Item) -> str:
    if not _is_live(item):
        return "others"
    return "patient" if item.path.stem in _PATIENT_MODULES else "live"


def _is_live(item: pytest.Item) -> bool:
    assert isinstance(item, pytest.Function)
    if _LIVE_FIXTURES & set(item.fixturenames):
        return True
    fixtures = (one.func for several in item._fixtureinfo.name2fixturedefs.values() for one in several)
    return any(_LIVE_NAMES & _names_in(function, set()) for function in (item.function, *fixtures))


def _names_in(function: Any, seen: set[Any]) -> set[str]:
    """The names that a function uses, and those that functions and classes of its own module use on its behalf."""
    function = inspect.unwrap(function)
    functions = [one for one in vars(function).values() if inspect.isfunction(one)] if inspect.isclass(function) else []
    codes = [one.__code__ for one in (functions or [function]) if inspect.isfunction(one)]
    names: set[str] = set()
    while codes:
        code = codes.pop()
        names.update(code.co_names)
        codes += [one for one in code.co_consts if inspect.iscode(one)]
    module = sys.modules.get(function.__module__)
    for name in set(names):
        used = getattr(module, name, None)
        if getattr(used, "__module__", None) == function.__module__ and used not in seen:
            seen.add(used)
            names |= _names_in(used, seen)
    return names


def obey_ctrl_c() -> None:
    """A ``preexec_fn``: SIGINT ends the child also if the tests run in the background, where shells have it ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def swarm_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What Swarm keeps goes to a temporary directory; child processes inherit it, and both parts share it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOGC", "100")  # of p2pd: hundreds are started for a short life, and collecting is a third of it
        patch.setenv("SWARM_HOME", os.environ.get(SHARED_HOME) or str(tmp_path_factory.mktemp("swarm-home")))
        torch.set_num_threads(1)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with a tiny random llama of 4 blocks."""
    directory = tmp_path_factory.mktemp("tiny")
    save_tiny_model("llama", directory)
    return str(directory)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system without a byte left. Files can be removed to make room."""
    disk = tmp_path / "full-disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        with pytest.raises(OSError, match="No space left"), (disk / "filling").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@dataclass(frozen=True)
class SmolLM2:
    """The real model on this machine: what a swarm's output must equal."""

    checkpoint: Checkpoint
    whole: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def chat(self, *contents: str) -> Any:
        """The inputs for a conversation in which user and assistant take turns."""
        roles = ("user", "assistant")
        messages = [{"role": roles[turn % 2], "content": content} for turn, content in enumerate(contents)]
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )

    @functools.lru_cache  # noqa: B019 - one instance, which lives as long as the tests
    def greedy(self, question: str, max_new_tokens: int) -> torch.Tensor:
        """The local model's answer, prompt included."""
        ids: torch.Tensor = self.whole.generate(
            **self.chat(question), do_sample=False, max_new_tokens=max_new_tokens, min_new_tokens=max_new_tokens
        )
        return ids


@pytest.fixture(scope="session")
def smollm2(swarm_home: None) -> SmolLM2:
    """SmolLM2-135M-Instruct, loaded by transformers alone, which needs half a minute for it once."""
    checkpoint = open_checkpoint("smollm2")
    kept = cache_directory("reference")
    with alone_in(kept.parent):
        if not (kept / "config.json").exists():
            # What comes from a GGUF file cannot be saved as it is.
            plain = AutoModelForCausalLM.from_config(copy.deepcopy(checkpoint.config), dtype=torch.float32)
            plain.load_state_dict(load_whole_model(checkpoint).state_dict())
            fill_directory_atomically(kept, plain.save_pretrained)
    whole = AutoModelForCausalLM.from_pretrained(kept, dtype=torch.float32).eval()
    return SmolLM2(checkpoint, whole, checkpoint.tokenizer())


@pytest.fixture(scope="session")
def warm(swarm_home: None) -> Iterator[WarmLoopback]:
    """Starts processes on loopback that need not import everything anew."""
    host = WarmLoopback()
    yield host
    host.close()


@pytest.fixture(scope="module")
def swarm(warm: WarmLoopback) -> Iterator[LocalSwarm]:
    """A bootstrap peer; the test module starts the servers that it needs."""
    with LocalSwarm(warm) as local:
        yield local


@pytest.fixture(scope="module")
def connect(swarm: LocalSwarm) -> Iterator[Callable[..., Any]]:
    """Opens models on the module's swarm, and closes them at the end."""
    opened = []

    def open_model(model: str, **options: Any) -> Any:
        opened.append(
            AutoDistributedModelForCausalLM.from_pretrained(model, initial_peers=swarm.initial_peers, **options)
        )
        return opened[-1]

    yield open_model
    for model in opened:
        model.disconnect()
