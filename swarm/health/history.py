"""What was seen in the last 30 days, in a SQLite file: the older, the coarser.

Every sample goes into an interval of each :data:`RESOLUTIONS`, which is deleted when it is too old for its resolution:
nothing needs to be computed anew when it ages. Methods block; each is one transaction, and may be called from any
thread.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from swarm.errors import DiskError
from swarm.health.incidents import Incident, Kind
from swarm.health.verdicts import Health

KEPT_S = 30 * 24 * 3600
MAX_INCIDENTS = 20_000
_DAY_S = 24 * 3600
_SCHEMA_VERSION = 1


class Resolution(NamedTuple):
    """How finely the past is kept, and how much of it."""

    interval_s: int
    kept_s: int


RESOLUTIONS = (Resolution(60, _DAY_S), Resolution(600, 7 * _DAY_S), Resolution(3600, KEPT_S))

_SCHEMA = """
CREATE TABLE samples (
    interval_s INTEGER, model TEXT, begin INTEGER, name TEXT, seconds REAL, servers REAL, survives REAL, bound REAL,
    sessions REAL, healthy REAL, degraded REAL, broken REAL, PRIMARY KEY (interval_s, model, begin)
) WITHOUT ROWID;
CREATE TABLE incidents (
    at REAL, kind TEXT, model TEXT, model_name TEXT, server TEXT, server_name TEXT, text TEXT
);
CREATE INDEX incidents_at ON incidents (at);
CREATE INDEX incidents_server ON incidents (server, at);
CREATE TABLE peers (peer_id TEXT PRIMARY KEY, first_seen REAL, last_seen REAL, online_s REAL) WITHOUT ROWID;
CREATE TABLE donations (
    peer_id TEXT, day INTEGER, name TEXT, block_s REAL, PRIMARY KEY (peer_id, day)
) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Sample:
    """A model for some seconds. Averages, once several are summed up."""

    model: str
    name: str
    at: float
    """Unix time at which it begins."""
    seconds: float
    servers: float
    survives: float
    """-1 while some block has no server."""
    bound_steps_per_s: float
    sessions: float
    healthy: float
    """Share of the time, 0 to 1."""
    degraded: float
    broken: float

    @classmethod
    def of(
        cls, model: str, name: str, at: float, seconds: float, health: Health, survives: int | None, servers: int,
        bound_steps_per_s: float, sessions: int,
    ) -> Sample:  # fmt: skip
        """What was seen in one look."""
        shares = (float(health is one) for one in Health)
        survived = -1.0 if survives is None else float(survives)
        return cls(model, name, at, seconds, servers, survived, bound_steps_per_s, sessions, *shares)


@dataclass(frozen=True)
class Donation:
    """What a server gave in some seconds."""

    peer_id: str
    public_name: str
    at: float
    online_s: float
    block_s: float
    """Blocks hosted, times seconds."""


@dataclass(frozen=True)
class Contributor:
    """One name, or one peer without a name."""

    peer_id: str
    """One of theirs."""
    public_name: str
    servers: int
    block_hours: float


@dataclass(frozen=True)
class PeerPast:
    """What is remembered of a peer."""

    first_seen: float
    last_seen: float
    online_s: float
    block_hours: float


class History:
    """The file. :meth:`close` it at the end."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            DiskError: the file cannot be written, or is something else.
        """
        self._path, self._lock = path, threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, check_same_thread=False, timeout=5)
            with self._database, closing(self._database.cursor()) as cursor:
                cursor.execute("PRAGMA journal_mode = WAL")
                cursor.execute("PRAGMA synchronous = NORMAL")
                (version,) = cursor.execute("PRAGMA user_version").fetchone()
                (tables,) = cursor.execute("SELECT count(*) FROM sqlite_master").fetchone()
                if version != _SCHEMA_VERSION and tables:
                    raise DiskError(f"{path} is no history of this version of Swarm. Choose another with --history.")
                if not tables:
                    cursor.executescript(f"{_SCHEMA} PRAGMA user_version = {_SCHEMA_VERSION};")
        except (sqlite3.Error, OSError) as error:
            raise DiskError(f"The history cannot be kept in {path}: {error}. Choose another with --history.") from error

    def close(self) -> None:
        """Nothing can be written or read afterwards."""
        with self._lock:
            self._database.close()

    def add(self, samples: Iterable[Sample], donations: Iterable[Donation], incidents: Iterable[Incident]) -> None:
        """Write down what was seen.

        Raises:
            DiskError: it cannot be written; nothing of it is.
        """
        intervals = [
            (
                one.interval_s, sample.model, int(sample.at // one.interval_s) * one.interval_s, sample.name,
                sample.seconds, sample.servers, sample.survives, sample.bound_steps_per_s, sample.sessions,
                sample.healthy, sample.degraded, sample.broken,
            )
            for sample in samples
            for one in RESOLUTIONS
        ]  # fmt: skip
        given = list(donations)
        try:
            with self._lock, self._database as database:
                database.executemany(_ADD_SAMPLE, intervals)
                database.executemany(_ADD_PEER, [(one.peer_id, one.at, one.at, one.online_s) for one in given])
                database.executemany(
                    _ADD_DONATION,
                    [(one.peer_id, int(one.at // _DAY_S), one.public_name, one.block_s) for one in given],
                )
                database.executemany(
                    "INSERT INTO incidents VALUES (?, ?, ?, ?, ?, ?, ?)",
                    [
                        (one.at, one.kind, one.model, one.model_name, one.server, one.server_name, one.text)
                        for one in incidents
                    ],
                )
        except sqlite3.Error as error:
            raise DiskError(f"The history could not be written to {self._path}: {error}") from error

    def forget(self, now: float) -> None:
        """Delete what is too old.

        Raises:
            DiskError: it cannot be written.
        """
        try:
            with self._lock, self._database as database:
                for interval_s, kept_s in RESOLUTIONS:
                    database.execute(
                        "DELETE FROM samples WHERE interval_s = ? AND begin < ?", (interval_s, now - kept_s)
                    )
                database.execute("DELETE FROM incidents WHERE at < ?", (now - KEPT_S,))
                database.execute(
                    "DELETE FROM incidents WHERE rowid <= (SELECT max(rowid) FROM incidents) - ?", (MAX_INCIDENTS,)
                )
                database.execute("DELETE FROM peers WHERE last_seen < ?", (now - KEPT_S,))
                database.execute("DELETE FROM donations WHERE day < ?", ((now - KEPT_S) // _DAY_S,))
        except sqlite3.Error as error:
            raise DiskError(f"The history could not be written to {self._path}: {error}") from error

    def samples(self, begin: float, end: float, model: str | None = None) -> tuple[int, list[Sample]]:
        """What is kept of ``[begin, end)``, by model and time, and how many seconds a sample stands for."""
        interval_s = resolution_for(end - begin).interval_s
        rows = self._read(
            "SELECT model, name, begin, seconds, servers, survives, bound, sessions, healthy, degraded, broken "
            "FROM samples WHERE interval_s = ? AND begin >= ? AND begin < ? AND (? IS NULL OR model = ?) "
            "ORDER BY model, begin",
            (interval_s, begin - interval_s, end, model, model),
        )
        return interval_s, [Sample(*row) for row in rows]

    def incidents(
        self, limit: int, *, begin: float = 0.0, end: float = 1e12, model: str | None = None, server: str | None = None
    ) -> list[Incident]:
        """The latest, newest first."""
        rows = self._read(
            "SELECT at, kind, model, model_name, server, server_name, text FROM incidents WHERE at >= ? AND at < ? "
            "AND (? IS NULL OR model = ?) AND (? IS NULL OR server = ?) ORDER BY at DESC, rowid DESC LIMIT ?",
            (begin, end, model, model, server, server, limit),
        )
        return [Incident(at, Kind(kind), *rest) for at, kind, *rest in rows]

    def contributors(self, limit: int, now: float) -> list[Contributor]:
        """Who gave most within 30 days. A peer's name is what it last called itself; peers of one name are one."""
        rows = self._read(
            "WITH given AS (SELECT peer_id, sum(block_s) AS block_s, name, max(day) FROM donations WHERE day >= ? "
            "GROUP BY peer_id) SELECT min(peer_id), name, count(*), sum(block_s) / 3600 AS hours FROM given "
            "GROUP BY CASE name WHEN '' THEN peer_id ELSE name END, name ORDER BY hours DESC LIMIT ?",
            ((now - KEPT_S) // _DAY_S, limit),
        )
        return [Contributor(*row) for row in rows]

    def peer(self, peer_id: str) -> PeerPast | None:
        """What is remembered of one; None: nothing."""
        rows = self._read(
            "SELECT first_seen, last_seen, online_s, (SELECT coalesce(sum(block_s), 0) / 3600 FROM donations "
            "WHERE donations.peer_id = peers.peer_id) FROM peers WHERE peer_id = ?",
            (peer_id,),
        )
        return PeerPast(*rows[0]) if rows else None

    def _read(self, query: str, values: Sequence[object]) -> list[Any]:
        try:
            with self._lock:
                return self._database.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise DiskError(f"The history could not be read from {self._path}: {error}") from error


def resolution_for(seconds: float) -> Resolution:
    """The finest that reaches so far back."""
    return next((one for one in RESOLUTIONS if seconds <= one.kept_s), RESOLUTIONS[-1])


def _average(column: str) -> str:
    return f"{column} = ({column} * seconds + excluded.{column} * excluded.seconds) / (seconds + excluded.seconds)"


_AVERAGED = ("servers", "survives", "bound", "sessions", "healthy", "degraded", "broken")
_ADD_SAMPLE = (
    "INSERT INTO samples VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET name = excluded.name, "
    f"{', '.join(map(_average, _AVERAGED))}, seconds = seconds + excluded.seconds"
)
_ADD_PEER = (
    "INSERT INTO peers VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET last_seen = excluded.last_seen, "
    "online_s = online_s + excluded.online_s"
)
_ADD_DONATION = (
    "INSERT INTO donations VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET name = excluded.name, "
    "block_s = block_s + excluded.block_s"
)
