"""A server holds its weights and little else: what it needed to start or to load is not imported, or is given back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_tiny_model

from swarm.server.resident_memory import _read_only_file_areas

SERVER = """
import json, sys
import swarm.lean_imports
import psutil, torch
from swarm.server.preparation import prepare
from swarm.models import load_span
from swarm.server.resident_memory import memory_given_back
from swarm.server.settings import ServerSettings

def resident():
    return psutil.Process().memory_info().rss

prepared = prepare(ServerSettings(sys.argv[1], blocks=(0, 2)))
span = load_span(prepared.checkpoint, 0, 2, dtype=prepared.dtype)
random = torch.Generator().manual_seed(0)
hidden_states = torch.randn(1, 3, prepared.checkpoint.hidden_size, generator=random)
before, resident_before = span.forward(hidden_states, span.new_cache()), resident()
with memory_given_back():
    pass
resident_after, after = resident(), span.forward(hidden_states, span.new_cache())
unwanted = {"torch._dynamo", "torch._prims", "torch.distributed.tensor", "sympy", "scipy", "accelerate"}
heavy = unwanted & sys.modules.keys()
print(json.dumps({
    "heavy": sorted(heavy), "given_back_mib": (resident_before - resident_after) / 2**20,
    "same": torch.equal(before, after),
}))
"""
COMPILING = """
import json
import swarm.lean_imports
import torch
random = torch.Generator()
assert torch.equal(torch.randn(9, generator=random.manual_seed(1)), torch.randn(9, generator=random.manual_seed(1)))
compiled = torch.compile(lambda x: torch.nn.functional.linear(x, x).relu() + 1, backend="eager")(torch.ones(3, 3))
import torch._dynamo
print(json.dumps({"compiler": torch._dynamo.__file__, "compiled": float(compiled.sum())}))
"""


def told_by(script: str, *arguments: str) -> dict[str, Any]:
    result = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "bloom", "mixtral", "gpt_oss", "deepseek_v3"])
def test_a_server_runs_without_what_it_never_uses(family: str, tmp_path: Path) -> None:
    save_tiny_model(family, tmp_path)
    found = told_by(SERVER, str(tmp_path))
    assert found["heavy"] == []
    assert found["same"]
    assert found["given_back_mib"] > 20 or sys.platform != "linux"


def test_who_wants_the_compiler_gets_the_real_one() -> None:
    found = told_by(COMPILING)
    assert found["compiler"].endswith("__init__.py") and found["compiled"] == 36


def test_the_server_command_imports_nothing_before_what_keeps_it_small() -> None:
    script = (
        "import sys, swarm.commands.server; "
        "print(sorted({'torch._dynamo', 'torch._prims', 'sympy', 'scipy'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.stdout == "[]\n", result.stderr


SMAPS = """\
1000-3000 r-xp 00000000 08:01 12 /usr/lib/code.so
Rss: 8 kB
Anonymous: 0 kB
3000-4000 r--p 00000000 08:01 12 /usr/lib/code.so
Rss: 4 kB
Anonymous: 4 kB
4000-5000 rw-p 00000000 08:01 12 /usr/lib/code.so
Anonymous: 0 kB
5000-6000 r-xp 00000000 00:00 0                          [vdso]
Anonymous: 0 kB
6000-7000 r--p 00000000 00:00 0
Anonymous: 0 kB
7f0000000000-7f0000002000 r--s 00000000 08:01 13 /home/a name with spaces
Anonymous: 0 kB
"""


def test_only_what_is_in_a_file_unchanged_is_let_go() -> None:
    assert list(_read_only_file_areas(SMAPS)) == [(0x1000, 0x3000), (0x7F0000000000, 0x7F0000002000)]
