"""A wheel holds what the tree holds."""

from __future__ import annotations

import configparser
from pathlib import Path

_ROOT = Path(__file__).parent.parent


def test_every_folder_of_modules_is_a_package_of_the_wheel() -> None:
    setup = configparser.ConfigParser()
    setup.read(_ROOT / "setup.cfg")
    named = set(setup["options"]["packages"].split())
    found = {
        ".".join(["swarm", *path.parent.relative_to(_ROOT / "swarm" if top == "swarm" else _ROOT).parts])
        for top in ("swarm", "server", "client", "dht")
        for path in (_ROOT / top).rglob("__init__.py")
    }
    assert found == named
