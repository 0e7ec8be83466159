"""What all tests share: a private home for caches, away from the user's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def swarm_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Everything that Swarm keeps goes to a temporary directory; child processes inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SWARM_HOME", str(tmp_path_factory.mktemp("swarm-home")))
        yield
