"""Turn looks into a running story: the next snapshot, and what of it goes into the history."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

from swarm.dht import Announcement
from swarm.dht.display_name import short_id, shown_name
from swarm.errors import DiskError
from swarm.health.board import Board
from swarm.health.history import Donation, History, Sample
from swarm.health.incidents import Incident, incidents_between
from swarm.health.model_facts import ModelFacts
from swarm.health.observation import Observation
from swarm.health.presenting import Snapshot
from swarm.health.swarm_state import Condition, ServerRecord, SwarmState, advance
from swarm.health.verdicts import judge
from swarm.health.views import ContributorView

logger = logging.getLogger(__name__)

SHOWN_INCIDENTS = 30
SHOWN_CONTRIBUTORS = 10
_WRITE_EVERY_S = 15.0
_FORGET_EVERY_S = 3600.0
_LONGEST_LOOK_S = 15.0
"""If looks are further apart, the dashboard slept or was cut off: nothing is known of that time."""


class Chronicle:
    """Takes in looks, one at a time, and publishes on `board`. Its methods block for as long as a disk takes."""

    def __init__(self, board: Board, history: History, asked_for: Mapping[str, ModelFacts]) -> None:
        """
        Args:
            asked_for: models that are shown whether anybody hosts them or not, by digest.
        """
        self._board, self._history, self._asked_for = board, history, asked_for
        self._samples: list[Sample] = []
        self._donations: dict[str, Donation] = {}
        self._incidents: list[Incident] = []
        self._written_at = self._forgotten_at = 0.0
        first = replace(board.latest, incidents=tuple(history.incidents(SHOWN_INCIDENTS)))
        self._board.publish(first)

    @property
    def state(self) -> SwarmState:
        """As of the last look."""
        return self._board.latest.state

    def tell(self, note: str) -> None:
        """Publish why the swarm is not seen."""
        latest = self._board.latest
        if latest.note != note:
            self._board.publish(replace(latest, sequence=latest.sequence + 1, note=note))

    def take_in(self, seen: Observation, note: str = "") -> Snapshot:
        """Publish what is known after one more look."""
        latest = self._board.latest
        state = advance(latest.state, seen, self._asked_for)
        by_model = state.by_model()
        verdicts = {digest: judge(facts, by_model[digest], state.at) for digest, facts in state.models.items()}
        news = incidents_between(latest.state, latest.verdicts, state, verdicts)
        since = {
            digest: latest.health_since[digest]
            if digest in latest.verdicts and latest.verdicts[digest].health is verdict.health
            else state.at
            for digest, verdict in verdicts.items()
        }
        snapshot = Snapshot(
            latest.sequence + 1,
            state,
            verdicts,
            since,
            note,
            (*reversed(news), *latest.incidents)[:SHOWN_INCIDENTS],
            latest.contributors,
            latest.history_note,
        )
        self._incidents += news
        looked_s = state.at - latest.state.at
        if 0 < looked_s <= _LONGEST_LOOK_S and not note:
            self._note_samples(snapshot, by_model, looked_s)
        if state.at - self._written_at >= _WRITE_EVERY_S:
            snapshot = self._write(snapshot)
        self._board.publish(snapshot)
        return snapshot

    def close(self) -> None:
        """Write what is not yet written."""
        self._write(self._board.latest)

    def _note_samples(self, snapshot: Snapshot, by_model: Mapping[str, list[ServerRecord]], looked_s: float) -> None:
        state = snapshot.state
        for digest, facts in state.models.items():
            verdict, records = snapshot.verdicts[digest], by_model[digest]
            online = [one for one in records if one.condition is Condition.ONLINE]
            self._samples.append(
                Sample.of(
                    digest,
                    facts.name,
                    state.at,
                    looked_s,
                    verdict.health,
                    verdict.coverage.survives,
                    len(online),
                    verdict.bound_steps_per_s,
                    verdict.sessions,
                )
            )
            for one in online:
                peer_id = one.announcement.peer_id
                given = self._donations.get(peer_id) or Donation(peer_id, "", state.at, 0.0, 0.0)
                self._donations[peer_id] = Donation(
                    peer_id,
                    shown_name(one.announcement.public_name),
                    state.at,
                    given.online_s + looked_s,
                    given.block_s + looked_s * _blocks(one, facts),
                )

    def _write(self, snapshot: Snapshot) -> Snapshot:
        """Write what has come together; returns the snapshot with what the history then says."""
        now = snapshot.state.at
        self._written_at = now
        try:
            self._history.add(self._samples, self._donations.values(), self._incidents)
            if now - self._forgotten_at >= _FORGET_EVERY_S:
                self._forgotten_at = now
                self._history.forget(now)
            contributors = [
                ContributorView(
                    name=one.public_name or short_id(one.peer_id),
                    is_named=bool(one.public_name),
                    servers=one.servers,
                    block_hours=round(one.block_hours, 3),
                )
                for one in self._history.contributors(SHOWN_CONTRIBUTORS, now)
            ]
            snapshot = replace(snapshot, contributors=tuple(contributors), history_note="")
        except DiskError as error:
            logger.warning("%s", error)
            snapshot = replace(snapshot, history_note="No history is being kept: its file cannot be written.")
        self._samples, self._donations, self._incidents = [], {}, []
        return snapshot


def _blocks(record: ServerRecord, facts: ModelFacts) -> float:
    """How many blocks a server hosts; of experts, the share of each block."""
    said = record.announcement
    if isinstance(said, Announcement):
        return said.end - said.start
    counts = {block: sum(byte.bit_count() for byte in bitmap) for block, bitmap in said.bitmaps.items()}
    return sum(min(1.0, count / facts.experts[block]) for block, count in counts.items() if block in facts.experts)
