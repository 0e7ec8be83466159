"""What several processes want at the same time is computed once; nobody waits for ever for somebody who hangs."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from swarm import cache_directory
from swarm.cache_directory import alone_in, write_atomically


def test_whoever_comes_second_finds_what_the_first_computed(tmp_path: Path) -> None:
    kept = tmp_path / "new" / "figure"
    computed = []

    def look_for_it() -> None:
        with alone_in(kept.parent):
            if not kept.exists():
                time.sleep(0.1)
                computed.append(1)
                write_atomically(kept, "1")

    threads = [threading.Thread(target=look_for_it) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (computed, [path.name for path in kept.parent.iterdir()]) == ([1], ["figure"])


def test_who_hangs_is_not_waited_for_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_directory, "_PATIENCE_S", 0.1)
    holds, may_end = threading.Event(), threading.Event()

    def hang() -> None:
        with alone_in(tmp_path):
            holds.set()
            may_end.wait()

    hanging = threading.Thread(target=hang)
    hanging.start()
    holds.wait()
    begun = time.monotonic()
    with alone_in(tmp_path):
        assert 0.1 <= time.monotonic() - begun < 5
    may_end.set()
    hanging.join()


def test_nobody_waits_for_oneself(tmp_path: Path) -> None:
    begun = time.monotonic()
    with alone_in(tmp_path):
        with alone_in(tmp_path):
            pass
        begun_elsewhere = threading.Event()

        def come_second() -> None:
            with alone_in(tmp_path):
                begun_elsewhere.set()

        second = threading.Thread(target=come_second)
        second.start()
        assert not begun_elsewhere.wait(0.2)  # the inner one did not let go
    second.join()
    assert begun_elsewhere.is_set() and time.monotonic() - begun < 5


def test_where_nothing_can_be_kept_all_compute_for_themselves(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with alone_in(tmp_path / "file" / "cache"):
        pass
