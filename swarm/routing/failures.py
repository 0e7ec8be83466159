"""What a client remembers of servers that failed it. It is its own memory: nobody else is told.

A server that failed is left alone for a time (a *penalty*). Then one session may try it: if a step passes the server,
all is forgiven; if it fails again, it is left alone for twice as long. While a penalty runs, those who have no other
way may use it all the same, after a moment. Old failures fade: the longer a server has not failed, the smaller is its
next penalty. Pure: it is told the time (seconds, of any clock that only goes forward).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, auto


class Standing(Enum):
    """What a client may do with a server."""

    GOOD = auto()
    FAILED_NOW = auto()
    """Leave it alone, whatever it costs."""
    FAILED_LATELY = auto()
    """Use it only if there is no other way."""
    ON_TRIAL = auto()
    """One session tries it; to the others it is as if it had failed lately."""
    MAY_BE_TRIED = auto()
    """The next session that wants to is the trial."""


@dataclass(frozen=True)
class FailurePolicy:
    """How long a memory is, in seconds."""

    second_chance_s: float = 1.0
    """When there is no other way, a server that failed is tried again after this long."""
    longest_s: float = 600.0
    """No penalty is longer."""
    trial_s: float = 30.0
    """A trial of which nothing was heard for so long has ended."""
    halved_after_s: float = 60.0
    """A penalty that is over fades by half in this time."""


@dataclass(frozen=True)
class _Failure:
    reason: str
    failed_at: float
    base_s: float
    """The penalty of a first failure of this kind."""
    penalty_s: float
    trial_by: str | None = None
    trial_until: float = 0.0

    @property
    def until(self) -> float:
        return self.failed_at + self.penalty_s


_USUAL = FailurePolicy()


class FailureMemory:
    """Of all servers that failed one client and are not forgiven."""

    def __init__(self, policy: FailurePolicy = _USUAL) -> None:
        self._policy = policy
        self._failures: dict[str, _Failure] = {}

    def failed(self, peer_id: str, now: float, penalty_s: float, reason: str) -> None:
        """A server failed a session.

        Args:
            penalty_s: for a first failure of this kind. Several sessions that lose a server at once count as one, and
                so do attempts of those who have no other way.
        """
        before = self._failures.get(peer_id)
        if before is None:
            self._failures[peer_id] = _Failure(reason, now, penalty_s, penalty_s)
        elif now < before.until:
            left_s = max(penalty_s, before.until - now)
            self._failures[peer_id] = _Failure(reason, now, penalty_s, min(left_s, self._policy.longest_s))
        else:
            longer_s = max(penalty_s, 2 * self._faded_s(before, now))
            self._failures[peer_id] = _Failure(reason, now, penalty_s, min(longer_s, self._policy.longest_s))

    def succeeded(self, peer_id: str, since: float) -> None:
        """A step has passed the server, in a session that came to it at `since`: what was before is forgiven."""
        failure = self._failures.get(peer_id)
        if failure is not None and failure.failed_at <= since:
            del self._failures[peer_id]

    def standing(self, peer_id: str, now: float, session: str = "") -> Standing:
        """What `session` may do with a server."""
        failure = self._failures.get(peer_id)
        if failure is None:
            return Standing.GOOD
        if now < failure.failed_at + min(self._policy.second_chance_s, failure.penalty_s):
            return Standing.FAILED_NOW
        if now < failure.until:
            return Standing.FAILED_LATELY
        if self._faded_s(failure, now) < failure.base_s / 4:
            del self._failures[peer_id]  # so long ago that it says nothing any more
            return Standing.GOOD
        if failure.trial_by not in (None, session) and now < failure.trial_until:
            return Standing.ON_TRIAL
        return Standing.MAY_BE_TRIED

    def chosen(self, peer_id: str, now: float, session: str) -> None:
        """`session` goes to a server; if that may be tried, this is the trial."""
        if self.standing(peer_id, now, session) is Standing.MAY_BE_TRIED:
            trial_until = now + self._policy.trial_s
            self._failures[peer_id] = replace(self._failures[peer_id], trial_by=session, trial_until=trial_until)

    def reason(self, peer_id: str) -> str:
        """Why it failed the last time; empty if it is in good standing."""
        failure = self._failures.get(peer_id)
        return failure.reason if failure is not None else ""

    def expected_loss_s(self, peer_id: str, now: float) -> float:
        """What its history makes a session expect to lose: what is left of its penalty, after it, as a share of one
        second for a first failure, more for each further one, less as time goes by."""
        failure = self._failures.get(peer_id)
        return self._faded_s(failure, now) / failure.base_s if failure is not None else 0.0

    def _faded_s(self, failure: _Failure, now: float) -> float:
        over_s = max(0.0, now - failure.until)
        return float(failure.penalty_s * 0.5 ** (over_s / self._policy.halved_after_s))
