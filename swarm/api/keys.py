"""Who may ask, and how much: API keys with limits by the minute. Times are given."""

from __future__ import annotations

import hmac
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

_MINUTE_S = 60.0
_FORGOTTEN_CALLERS = 10_000
"""Above so many callers without a key, those whose allowance is full again are forgotten."""


@dataclass(frozen=True)
class Key:
    """One API key; None: no limit."""

    name: str
    """For the operator's eyes; it never leaves the gateway."""
    secret: str
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    """Of prompts and answers together."""


def read_keys(path: Path) -> tuple[Key, ...]:
    """Keys from a TOML file::

        [alice]
        key = "sk-…"
        requests_per_minute = 60      # optional
        tokens_per_minute = 100000    # optional

    Raises:
        ValueError: it is not such a file; it says where.
    """
    try:
        tables = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a TOML file of API keys: {error}") from error
    keys = tuple(_key(path, name, table) for name, table in tables.items())
    if not keys:
        raise ValueError(f"{path} names no API key; without --api-keys everybody may ask")
    if len({key.secret for key in keys}) < len(keys):
        raise ValueError(f"{path} has the same key under two names")
    return keys


def _key(path: Path, name: str, table: object) -> Key:
    known = {"key", "requests_per_minute", "tokens_per_minute"}
    if not isinstance(table, dict) or not isinstance(table.get("key"), str) or len(table["key"]) < 8:
        raise ValueError(f'{path}: [{name}] needs key = "…" of at least 8 characters')
    if unknown := table.keys() - known:
        raise ValueError(
            f"{path}: [{name}] has {', '.join(sorted(unknown))}, which is none of {', '.join(sorted(known))}"
        )
    limits: dict[str, float | None] = {}
    for limit in ("requests_per_minute", "tokens_per_minute"):
        value = table.get(limit)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
            raise ValueError(f"{path}: [{name}] {limit} = {value!r} is not a number above 0")
        limits[limit] = value
    return Key(name, table["key"], **limits)


class Allowance:
    """So much per minute, saved up for at most one minute (a token bucket)."""

    def __init__(self, per_minute: float, now: float) -> None:
        self._per_minute, self._left, self._at = per_minute, per_minute, now

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until `amount` may be taken; 0: now. More than a minute's is measured as a minute's."""
        self._refill(now)
        missing = min(amount, self._per_minute) - self._left
        return max(0.0, missing / self._per_minute * _MINUTE_S)

    def take(self, amount: float, now: float) -> None:
        """Take it; what was not there is owed."""
        self._refill(now)
        self._left -= amount

    def is_full(self, now: float) -> bool:
        """Whether nothing is missing."""
        self._refill(now)
        return self._left >= self._per_minute

    def _refill(self, now: float) -> None:
        self._left = min(self._per_minute, self._left + (now - self._at) * self._per_minute / _MINUTE_S)
        self._at = now


@dataclass(frozen=True)
class Caller:
    """Whoever asks: a key, or an address where no keys are asked for."""

    name: str
    requests: Allowance | None
    tokens: Allowance | None

    def wait_s(self, now: float) -> float:
        """Seconds until the next request is allowed; 0: now."""
        waits = [self.requests.wait_s(1, now)] if self.requests is not None else []
        waits += [self.tokens.wait_s(1, now)] if self.tokens is not None else []
        return max(waits, default=0.0)


class Callers:
    """Knows everybody's allowance.

    Args:
        keys: None: no key is asked for, and an address is a caller.
        requests_per_minute: of each address, where no key is asked for; None: no limit.
    """

    def __init__(self, keys: Iterable[Key] | None, requests_per_minute: float | None = None) -> None:
        self._keys = None if keys is None else tuple(keys)
        self._requests_per_minute = requests_per_minute
        self._known: dict[str, Caller] = {}

    @property
    def needs_key(self) -> bool:
        """Whether callers must show a key."""
        return self._keys is not None

    def caller(self, secret: str | None, address: str, now: float) -> Caller | None:
        """Whose request it is; None: the key is missing or wrong."""
        if self._keys is None:
            return self._of_name(f"address {address}", self._requests_per_minute, None, now)
        # All are compared, each in constant time: how long it takes tells nothing about any key.
        given = (secret or "").encode()
        found = [key for key in self._keys if hmac.compare_digest(key.secret.encode(), given)]
        if not found:
            return None
        (key,) = found
        return self._of_name(key.name, key.requests_per_minute, key.tokens_per_minute, now)

    def _of_name(self, name: str, requests: float | None, tokens: float | None, now: float) -> Caller:
        if name not in self._known:
            if len(self._known) >= _FORGOTTEN_CALLERS:
                self._known = dict(_not_full(self._known, now))
            self._known[name] = Caller(
                name,
                Allowance(requests, now) if requests is not None else None,
                Allowance(tokens, now) if tokens is not None else None,
            )
        return self._known[name]


def _not_full(callers: Mapping[str, Caller], now: float) -> Iterable[tuple[str, Caller]]:
    for name, caller in callers.items():
        if caller.requests is not None and not caller.requests.is_full(now):
            yield name, caller
