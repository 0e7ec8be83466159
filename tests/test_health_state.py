"""What the dashboard concludes from what it sees: pure, and compared with brute force where things are counted."""

from __future__ import annotations

import itertools
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.dht import LEASE_S, Announcement, ExpertAnnouncement, ModelListing, State
from swarm.dht.expert_announcement import bitmap_of, experts_in, heat_of
from swarm.errors import DiskError
from swarm.health.badge import badge_svg
from swarm.health.board import Board
from swarm.health.chronicle import Chronicle
from swarm.health.coverage import coverage_of
from swarm.health.history import RESOLUTIONS, Donation, History, Sample
from swarm.health.incidents import Incident, Kind
from swarm.health.model_facts import ModelFacts, agreed_facts, shown_model_name
from swarm.health.observation import Observation, Probe
from swarm.health.presenting import Snapshot, everything, model_detail, overview
from swarm.health.probing import due, tcp_endpoints
from swarm.health.prometheus import metrics_text
from swarm.health.swarm_state import DEATH_MEMORY_S, Condition, ServerKey, ServerRecord
from swarm.health.verdicts import Health
from tests.synthetic_swarm import digest, hosts_of, peer_id, span

MODEL = "sea"
BLOCKS = 4
BEGIN = 1_800_000_000.0


class Story:
    """A swarm that is looked at every two seconds."""

    def __init__(self, path: Path, asked_for: dict[str, ModelFacts] | None = None) -> None:
        self.now = BEGIN
        self.history = History(path / "history.sqlite")
        self._board = Board()
        self._chronicle = Chronicle(self._board, self.history, asked_for or {})
        self.news: list[Incident] = []

    def look(
        self, *said: Announcement | ExpertAnnouncement, probes: dict[str, Probe] | None = None, after_s: float = 2.0,
        renewed: bool = True, listings: tuple[ModelListing, ...] = (), note: str = "", is_blind: bool = False,
    ) -> Snapshot:  # fmt: skip
        """One more look. All that is said is renewed, and whoever speaks answers, unless told otherwise."""
        self.now += after_s
        if renewed:
            said = tuple(one.model_copy(update={"issued_at": self.now}) for one in said)
        answers = {one.peer_id: Probe(self.now, self.now, 0.01) for one in said} | (probes or {})
        spans = tuple(one for one in said if isinstance(one, Announcement))
        experts = tuple(one for one in said if isinstance(one, ExpertAnnouncement))
        before = {id(one) for one in self._board.latest.incidents}
        snapshot = self._chronicle.take_in(Observation(self.now, spans, experts, listings, answers, is_blind), note)
        self.news = [one for one in snapshot.incidents if id(one) not in before]
        return snapshot

    def refusal(self, one: Announcement) -> dict[str, Probe]:
        """It was dialled, and nobody listens."""
        return {one.peer_id: Probe(self.now + 2, self.now, None, refused=True)}


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return Story(tmp_path)


def server(number: int, start: int, end: int, **changes: object) -> Announcement:
    return span(number, MODEL, BLOCKS, start, end, **changes)


def condition(snapshot: Snapshot, number: int) -> Condition | None:
    record = snapshot.state.servers.get(ServerKey(digest(MODEL), peer_id(number), False))
    return record.condition if record else None


def verdict(snapshot: Snapshot) -> tuple[Health, str]:
    found = snapshot.verdicts[digest(MODEL)]
    return found.health, found.reason


def test_a_server_whose_port_refuses_is_dead_at_once_and_its_model_degraded_until_it_is_back(story: Story) -> None:
    one, other, whole = server(1, 0, 2, public_name="Ada"), server(2, 2, 4), server(3, 0, 4)
    story.look(one, other, whole)
    assert [one.kind for one in story.news] == [Kind.MODEL_FOUND]
    snapshot = story.look(one, other, whole)
    assert verdict(snapshot) == (Health.HEALTHY, "Every block has at least 2 servers.")
    last_words = one.model_copy(update={"issued_at": story.now})
    snapshot = story.look(
        last_words, *(x.model_copy(update={"issued_at": story.now}) for x in (other, whole)),
        probes=story.refusal(one), renewed=False,
    )  # fmt: skip
    assert condition(snapshot, 1) is Condition.DEAD, "although its announcement is still in the directory"
    assert verdict(snapshot) == (Health.DEGRADED, "Ada died; blocks 0–1 have 1 server left of 2.")
    assert [one.kind for one in story.news] == [Kind.MODEL_DEGRADED, Kind.SERVER_DIED]
    assert story.news[1].text == "Ada died, with blocks 0–1."
    assert snapshot.verdicts[digest(MODEL)].coverage.survives == 0
    snapshot = story.look(one, other, whole)
    assert condition(snapshot, 1) is Condition.ONLINE
    assert [one.kind for one in story.news] == [Kind.MODEL_HEALTHY, Kind.SERVER_RETURNED]


def test_a_death_that_uncovers_a_block_breaks_the_model_and_the_reason_names_both(story: Story) -> None:
    first, second = server(1, 0, 3), server(2, 3, 4)
    story.look(first, second)
    story.look(first, second)
    snapshot = story.look(first, probes=story.refusal(second))
    assert verdict(snapshot)[0] is Health.BROKEN
    assert verdict(snapshot)[1].startswith("No server is online for block 3: 12D3KooW")
    assert snapshot.verdicts[digest(MODEL)].coverage.survives is None
    loading = server(5, 3, 4, state=State.JOINING)
    assert verdict(story.look(first, loading))[1].endswith("a server is loading it.")


def test_one_that_falls_silent_is_dead_when_its_lease_has_run_out_and_not_when_one_look_misses_it(story: Story) -> None:
    one, other = server(1, 0, 4), server(2, 0, 4)
    story.look(one, other)
    story.look(one, other)
    silent = {one.peer_id: Probe(story.now + 1, story.now)}
    assert condition(story.look(other, probes=silent), 1) is Condition.ONLINE, "a keeper may have lost its record"
    began = story.now
    while condition(snapshot := story.look(other, probes=silent), 1) is not Condition.DEAD:
        assert story.now - began < LEASE_S
    assert verdict(snapshot)[0] is Health.DEGRADED


def test_one_that_says_farewell_has_left_and_its_model_is_as_healthy_as_before(story: Story) -> None:
    one, other = server(1, 0, 4), server(2, 0, 4)
    story.look(one, other)
    snapshot = story.look(server(1, 0, 4, state=State.OFFLINE), other)
    assert condition(snapshot, 1) is Condition.LEFT
    assert [one.kind for one in story.news] == [Kind.SERVER_LEFT]
    assert verdict(snapshot) == (Health.HEALTHY, "Every block has at least 1 server.")


def test_a_move_is_news_and_another_part_of_the_same_blocks_is_none(story: Story) -> None:
    story.look(server(1, 0, 4), server(2, 0, 4))
    story.look(server(1, 0, 4), server(2, 2, 4, loaded=(0, 4)))
    assert [one.kind for one in story.news] == []
    story.look(server(1, 0, 4), server(2, 0, 2))
    assert [one.kind for one in story.news] == [Kind.SERVER_MOVED]


def test_a_death_is_made_up_for_by_another_server_or_by_time(story: Story) -> None:
    one, other = server(1, 0, 4), server(2, 0, 4)
    story.look(one, other)
    assert verdict(story.look(other, probes=story.refusal(one)))[0] is Health.DEGRADED
    assert verdict(story.look(other, server(3, 0, 4)))[0] is Health.HEALTHY
    assert verdict(story.look(other, server(3, 0, 4, state=State.OFFLINE)))[0] is Health.DEGRADED
    snapshot = story.look(other, after_s=DEATH_MEMORY_S + 1)
    assert verdict(snapshot)[0] is Health.HEALTHY
    assert condition(snapshot, 1) is None


def test_blocks_whose_servers_drain_or_do_not_answer_degrade_the_model(story: Story) -> None:
    one, other = server(1, 0, 2), server(2, 2, 4)
    story.look(one, other)
    unreachable = {other.peer_id: Probe(story.now + 1, story.now)}
    assert verdict(story.look(one, other, probes=unreachable))[0] is Health.HEALTHY, "a single lost probe says little"
    unreachable = {other.peer_id: Probe(story.now + 1, story.now)}
    snapshot = story.look(one, other, probes=unreachable)
    assert condition(snapshot, 2) is Condition.UNREACHABLE
    assert verdict(snapshot) == (Health.DEGRADED, "All servers of blocks 2–3 cannot be reached from here.")
    snapshot = story.look(one, server(2, 2, 4, state=State.DRAINING))
    assert verdict(snapshot) == (Health.DEGRADED, "All servers of blocks 2–3 are leaving.")


def test_a_dashboard_that_is_cut_off_declares_nobody_dead(story: Story) -> None:
    one = server(1, 0, 4)
    story.look(one)
    snapshot = story.look(after_s=60, is_blind=True, note="cut off")
    assert condition(snapshot, 1) is Condition.ONLINE
    assert not overview(snapshot).connection.connected
    assert overview(snapshot).headline == "The swarm cannot be reached from here."


def test_liars_about_the_size_of_a_model_are_outvoted_and_bad_names_made_harmless(story: Story) -> None:
    liar = span(9, MODEL, 99, 0, 99)
    snapshot = story.look(server(1, 0, 4), server(2, 0, 4), liar)
    assert snapshot.state.models[digest(MODEL)].num_blocks == BLOCKS
    assert condition(snapshot, 9) is None
    odd = story.look(server(1, 0, 4, public_name="a\x1b[31m\u202eb\n"), server(2, 0, 4))
    assert next(one for one in everything(odd).servers if one.id == peer_id(1)).name == "a [31m b"


@pytest.mark.parametrize(
    ("told", "shown"),
    [("/home/ada/models/tiny", "tiny"), ("../tiny/", "tiny"), ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
     ("~/x", "x"), ("smollm2", "smollm2"), ("", ""), ("C:/x/y.gguf", "y.gguf")],
)  # fmt: skip
def test_of_a_path_on_a_strangers_machine_only_the_end_is_shown(told: str, shown: str) -> None:
    assert shown_model_name(told) == shown


def test_a_model_that_was_asked_for_is_shown_though_nobody_hosts_it(tmp_path: Path) -> None:
    story = Story(tmp_path, {digest(MODEL): ModelFacts(digest(MODEL), MODEL, BLOCKS)})
    assert verdict(story.look()) == (Health.BROKEN, "No server is online for any block.")


def test_a_model_that_is_only_listed_is_not_shown(story: Story) -> None:
    listing = ModelListing(peer_id=peer_id(1), model=digest("ghost"), model_name="ghost", num_blocks=9, issued_at=BEGIN)
    assert story.look(listings=(listing,)).state.models == {}


def test_no_address_is_told(story: Story) -> None:
    story.look(server(1, 0, 4))
    snapshot = story.look(server(1, 0, 4), probes=story.refusal(server(1, 0, 4)))
    told = everything(snapshot).model_dump_json() + metrics_text(overview(snapshot))
    assert peer_id(1) in told
    assert "203.0.113" not in told and "/ip4" not in told and "addresses" not in told


spans_of_six = st.lists(
    st.tuples(st.integers(0, 5), st.integers(1, 6)).filter(lambda pair: pair[0] < pair[1]), max_size=6
)


@given(spans_of_six)
@settings(max_examples=150, deadline=None)
def test_redundancy_equals_brute_force(spans: list[tuple[int, int]]) -> None:
    said = [span(number, MODEL, 6, *bounds) for number, bounds in enumerate(spans)]

    def works(alive: tuple[Announcement, ...]) -> bool:
        return all(any(one.hosts(block) for one in alive) for block in range(6))

    deaths = [
        dead for dead in range(len(said) + 1) if not all(map(works, itertools.combinations(said, len(said) - dead)))
    ]
    found = coverage_of(6, {}, said, [])
    assert found.survives == (None if 0 in deaths else min(deaths) - 1)
    assert found.copies.tolist() == [sum(one.hosts(block) for one in said) for block in range(6)]


@given(
    st.lists(st.sets(st.integers(0, 2)), max_size=3),
    st.lists(st.sets(st.integers(0, 2), min_size=1), max_size=4),
)
@settings(max_examples=200, deadline=None)
def test_redundancy_with_experts_is_what_brute_force_says_or_on_the_safe_side(
    kept: list[set[int]], hosted: list[set[int]]
) -> None:
    def announced(mine: set[int]) -> dict[int, str]:
        return {} if len(mine) == 3 else {0: bitmap_of(mine).hex()}

    spans = [span(number, MODEL, 1, 0, 1, kept_experts=announced(mine)) for number, mine in enumerate(kept)]
    hosts = [hosts_of(10 + number, MODEL, {0: sorted(mine)}) for number, mine in enumerate(hosted)]

    def works(alive: tuple[Announcement | ExpertAnnouncement, ...]) -> bool:
        there = {one for host in alive if isinstance(host, ExpertAnnouncement) for one in host.experts[0]}
        servers = [one for one in alive if isinstance(one, Announcement)]
        return any(
            not one.kept_experts or there | experts_in(bytes.fromhex(one.kept_experts[0])) == {0, 1, 2}
            for one in servers
        )

    everybody = [*spans, *hosts]
    falls = next(
        dead
        for dead in range(len(everybody) + 1)
        if not all(map(works, itertools.combinations(everybody, len(everybody) - dead)))
    )
    found = coverage_of(1, {0: 3}, spans, hosts)
    assert (found.survives is None) == (falls == 0)
    if found.survives is not None:
        assert found.survives <= falls - 1
        if len({frozenset(one) for one in kept if len(one) < 3}) <= 1:
            assert found.survives == falls - 1


def test_an_expert_that_nobody_hosts_breaks_the_model_or_degrades_it_if_another_server_has_it(story: Story) -> None:
    listing = ModelListing(
        peer_id=peer_id(1), model=digest(MODEL), num_blocks=BLOCKS, experts=((0, 4, 8),), issued_at=BEGIN
    )
    router = server(1, 0, 4, kept_experts=dict.fromkeys(range(4), ""))
    host = hosts_of(2, MODEL, {block: range(8) for block in range(4)})
    most = hosts_of(2, MODEL, {0: range(7)} | {block: range(8) for block in range(1, 4)})
    snapshot = story.look(router, host, listings=(listing,))
    assert verdict(snapshot)[0] is Health.HEALTHY
    experts = overview(snapshot).models[0].experts
    assert experts is not None and (experts.experts, experts.fewest_copies, experts.missing) == (32, 1, 0)
    snapshot = story.look(router, most, listings=(listing,))
    assert verdict(snapshot) == (
        Health.BROKEN, "Nobody hosts expert 7 of block 0, and no other server can stand in.",
    )  # fmt: skip
    snapshot = story.look(router, most, server(3, 0, 4), listings=(listing,))
    assert verdict(snapshot) == (
        Health.DEGRADED, "Nobody hosts expert 7 of block 0; some servers cannot work without.",
    )  # fmt: skip


def test_demand_for_experts_is_what_those_who_are_present_tell(story: Story) -> None:
    listing = ModelListing(
        peer_id=peer_id(1), model=digest(MODEL), num_blocks=BLOCKS, experts=((0, 4, 4),), issued_at=BEGIN
    )
    router = server(1, 0, 4, kept_experts=dict.fromkeys(range(4), ""))
    one = hosts_of(2, MODEL, {2: range(4)}, heats={2: bytes([heat_of(7), heat_of(0), heat_of(1), heat_of(0)])})
    other = hosts_of(3, MODEL, {2: [0, 1]}, heats={2: bytes([heat_of(3), heat_of(1)])})
    snapshot = story.look(router, one, other, listings=(listing,))
    detail = model_detail(snapshot, digest(MODEL))
    assert detail is not None
    assert detail.expert_shares == {2: [round(tokens / 12, 6) for tokens in (10, 1, 1, 0)]}
    detail = model_detail(story.look(router, one, listings=(listing,), after_s=LEASE_S * 2), digest(MODEL))
    assert detail is not None and detail.expert_shares[2][1] == 0.0


def test_most_servers_are_believed_and_equals_do_not_take_turns() -> None:
    listings = [
        ModelListing(peer_id=peer_id(one), model=digest(MODEL), model_name=name, num_blocks=blocks, issued_at=BEGIN)
        for one, (name, blocks) in enumerate([("b", 4), ("a", 4), ("a", 9), ("b", 9), ("c", 4)])
    ]
    for _ in range(5):
        random.shuffle(listings)
        facts = agreed_facts({}, {}, [], listings)[digest(MODEL)]
        assert (facts.name, facts.num_blocks) == ("a", 4)


def test_who_has_not_renewed_is_dialled_first_and_nobody_too_often() -> None:
    def record(number: int, renewed_at: float, probed_at: float) -> ServerRecord:
        probe = Probe(probed_at, probed_at, 0.01)
        return ServerRecord(server(number, 0, 4), Condition.ONLINE, 0, 0, renewed_at, probe, answered=True)

    fresh = [record(number, 98, 90 + number / 10) for number in range(5)]
    overdue, just_dialled = record(7, 90, 97.5), record(8, 90, 99)
    dead = replace(record(9, 0, 0), condition=Condition.DEAD)
    turn = due([*fresh, overdue, just_dialled, dead], 100.0, 3)
    assert [one.announcement.peer_id for one in turn] == [peer_id(7), peer_id(0), peer_id(1)]
    many = [record(number, 98, 90) for number in range(1000)]
    assert due(many, 100.0, 10) == [], "a thousand are dialled every 20 seconds, not every 3"


def test_only_addresses_that_lead_straight_to_a_port_are_dialled() -> None:
    found = tcp_endpoints(
        ["/ip4/1.2.3.4/tcp/5/p2p/12D3KooWx", "/ip6/::1/tcp/6", "/ip4/1.2.3.4/udp/7/quic-v1", "nonsense",
         "/ip4/1.2.3.4/tcp/5/p2p/12D3KooWx/p2p-circuit"]
    )  # fmt: skip
    assert found == [("1.2.3.4", 5), ("::1", 6)]


def test_the_past_gets_coarser_and_is_forgotten_and_averages_are_right(tmp_path: Path) -> None:
    history = History(tmp_path / "history.sqlite")
    day = 24 * 3600.0
    healths = [Health.HEALTHY, Health.HEALTHY, Health.BROKEN]
    for ago in (40 * day, 20 * day, 3 * day, 600.0):
        samples = [
            Sample.of("m", "sea", BEGIN - ago + 10 * index, 10.0 * (index + 1), health, 1, index, 5.0, 2)
            for index, health in enumerate(healths)
        ]
        history.add(samples, [], [Incident(BEGIN - ago, Kind.SERVER_DIED, "m", "sea", "p", "p", "gone")])
    history.forget(BEGIN)
    for hours, expected, interval_s in ((24, 1, 60), (7 * 24, 2, 600), (30 * 24, 3, 3600)):
        found_s, found = history.samples(BEGIN - hours * 3600, BEGIN)
        assert (len(found), found_s) == (expected, interval_s)
        latest = found[-1]
        assert latest.seconds == 60
        assert latest.servers == pytest.approx((0 * 10 + 1 * 20 + 2 * 30) / 60)
        assert (latest.healthy, latest.broken) == (pytest.approx(0.5), pytest.approx(0.5))
    assert len(history.incidents(10)) == 3
    assert [one.kept_s for one in RESOLUTIONS] == sorted(one.kept_s for one in RESOLUTIONS)
    history.close()
    again = History(tmp_path / "history.sqlite")
    assert len(again.incidents(10)) == 3
    again.close()


def test_contributors_are_summed_by_the_name_they_chose_and_the_nameless_stand_alone(tmp_path: Path) -> None:
    history = History(tmp_path / "history.sqlite")
    given = [
        Donation("a", "Ada", BEGIN, 60, 3600), Donation("b", "Ada", BEGIN, 60, 7200),
        Donation("c", "", BEGIN, 60, 1800),
        Donation("d", "", BEGIN - 40 * 24 * 3600, 60, 1e9), Donation("a", "Ada", BEGIN + 9, 60, 3600),
        Donation("e", "", BEGIN, 60, 900),
    ]  # fmt: skip
    for one in given:
        history.add([], [one], [])
    found = [(one.public_name, one.servers, one.block_hours) for one in history.contributors(9, BEGIN)]
    assert found == [("Ada", 2, 4.0), ("", 1, 0.5), ("", 1, 0.25)]
    past = history.peer("a")
    assert past is not None and past.online_s == 120


def test_a_file_that_is_something_else_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("Dear Ada, " * 1000)
    with pytest.raises(DiskError, match=r"letter\.txt.*Choose another with --history"):
        History(tmp_path / "letter.txt")


def test_a_badge_is_svg_whatever_the_model_is_called() -> None:
    import xml.etree.ElementTree as ElementTree

    for name in ("sea", '<script>"&', "w" * 500, ""):
        for health in (*Health, None):
            assert ElementTree.fromstring(badge_svg(name, health)).tag.endswith("svg")


def test_a_thousand_servers_are_taken_in_quickly(tmp_path: Path) -> None:
    from tests.synthetic_swarm import SyntheticSwarm, crowd

    board = Board()
    swarm = SyntheticSwarm(Chronicle(board, History(tmp_path / "history.sqlite"), {}), crowd(1000, 5, 80))
    swarm.look(BEGIN)
    begun = time.process_time()
    swarm.look(BEGIN + 2)
    assert time.process_time() - begun < 2, "a look every two seconds"
    assert len(board.latest.state.servers) == 5000
    assert all(one.health is Health.HEALTHY for one in board.latest.verdicts.values())
