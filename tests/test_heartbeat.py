"""When a silent peer is asked for a sign of life, and when it is given up."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.transport.heartbeat import Heartbeat

quick = settings(deadline=None, max_examples=200)
GAPS = st.lists(st.floats(0.01, 10.0), max_size=30)


def fresh() -> Heartbeat:
    heartbeat = Heartbeat(interval_s=1.0, timeout_s=3.0)
    heartbeat.heard(10.0)
    return heartbeat


def test_a_peer_is_asked_after_the_interval_and_dead_after_the_timeout() -> None:
    heartbeat = fresh()
    assert not heartbeat.should_ask(10.9)
    assert heartbeat.should_ask(11.0)
    assert not heartbeat.is_dead(13.9)
    assert heartbeat.is_dead(14.0)


def test_a_peer_that_nobody_asked_is_never_dead() -> None:
    assert not fresh().is_dead(1e9)


def test_a_peer_that_fell_silent_is_asked_once_per_interval_and_the_first_question_counts() -> None:
    heartbeat, asked = fresh(), []
    for tick in range(41, 57):  # every quarter of a second from 10.25
        if heartbeat.should_ask(tick / 4):
            asked.append(tick / 4)
        assert not heartbeat.is_dead(tick / 4) or tick / 4 >= 14.0
    assert asked == [11.0, 12.0, 13.0, 14.0]
    assert heartbeat.is_dead(14.0)


def test_any_sign_of_life_starts_over() -> None:
    heartbeat = fresh()
    assert heartbeat.should_ask(11.0)
    heartbeat.heard(13.5)
    assert not heartbeat.is_dead(100.0)
    assert not heartbeat.should_ask(14.25)
    assert heartbeat.should_ask(14.5)
    assert not heartbeat.is_dead(17.25)
    assert heartbeat.is_dead(17.5)


def test_a_peer_that_answers_after_all_is_alive() -> None:
    heartbeat = Heartbeat(interval_s=1.0, timeout_s=5.0)
    heartbeat.heard(0.0)
    assert not heartbeat.should_ask(0.5) and heartbeat.should_ask(1.0)
    assert not heartbeat.is_dead(5.9)
    assert heartbeat.is_dead(6.0)
    heartbeat.heard(6.0)  # slow, but alive
    assert not heartbeat.is_dead(6.5)


def test_a_shorter_interval_takes_effect_at_once() -> None:
    heartbeat = Heartbeat(interval_s=10.0, timeout_s=3.0)
    assert not heartbeat.should_ask(5.0)
    heartbeat.interval_s = 0.5
    assert heartbeat.should_ask(5.0)


def test_answers_tell_how_long_the_way_is_and_other_messages_do_not() -> None:
    heartbeat = fresh()
    heartbeat.heard(10.5)
    assert heartbeat.round_trip_s is None
    heartbeat.asked(11.0)
    heartbeat.heard(11.25)
    assert heartbeat.round_trip_s is None
    heartbeat.asked(12.0)
    heartbeat.answered(12.5)
    assert heartbeat.round_trip_s == 0.5


def test_the_round_trip_is_smoothed() -> None:
    heartbeat = fresh()
    for begun, took in [(11.0, 0.5), (12.0, 0.5), (13.0, 1.5)]:
        heartbeat.asked(begun)
        heartbeat.answered(begun + took)
    assert heartbeat.round_trip_s == 0.5 + (1.5 - 0.5) / 4


def test_an_answer_that_may_belong_to_an_earlier_question_measures_nothing() -> None:
    heartbeat = fresh()
    heartbeat.asked(11.0)
    heartbeat.asked(12.0)
    heartbeat.answered(12.125)
    assert heartbeat.round_trip_s is None
    heartbeat.answered(12.25)  # the second one, which nobody waits for any more
    assert heartbeat.round_trip_s is None
    heartbeat.asked(13.0)
    heartbeat.answered(13.25)
    assert heartbeat.round_trip_s == 0.25


def test_an_answer_is_a_sign_of_life() -> None:
    heartbeat = fresh()
    heartbeat.asked(11.0)
    heartbeat.answered(13.5)
    assert not heartbeat.is_dead(100.0)
    assert not heartbeat.should_ask(14.25) and heartbeat.should_ask(14.5)


def test_patience_grows_with_the_round_trip() -> None:
    heartbeat = fresh()
    heartbeat.asked(11.0)
    heartbeat.answered(11.5)
    heartbeat.asked(20.0)
    assert not heartbeat.is_dead(23.0) and not heartbeat.is_dead(24.75)
    assert heartbeat.is_dead(25.0)  # 3 s, and four round trips


@given(st.floats(0.0, 10.0), st.floats(0.0, 5.0))
@quick
def test_a_link_with_longer_ways_is_never_given_up_sooner(round_trip_s: float, silent_s: float) -> None:
    near, far = Heartbeat(1.0, 3.0, round_trip_s=round_trip_s / 2), Heartbeat(1.0, 3.0, round_trip_s=round_trip_s)
    for heartbeat in (near, far):
        heartbeat.asked(10.0)
    assert near.is_dead(10.0 + silent_s) or not far.is_dead(10.0 + silent_s)


@given(st.lists(st.tuples(st.floats(0.01, 5.0), st.floats(0.0, 2.9)), max_size=20))
@quick
def test_a_slow_peer_that_answers_in_time_is_never_dead(exchanges: list[tuple[float, float]]) -> None:
    heartbeat, now = Heartbeat(interval_s=1.0, timeout_s=3.0), 0.0
    heartbeat.heard(now)
    for quiet_s, delay_s in exchanges:
        now += quiet_s
        if heartbeat.should_ask(now):
            now += delay_s
            assert not heartbeat.is_dead(now)
            heartbeat.heard(now)
        assert not heartbeat.is_dead(now)


@given(GAPS)
@quick
def test_a_silent_peer_is_dead_exactly_when_the_first_question_is_too_old(gaps: list[float]) -> None:
    heartbeat, now, first_asked = Heartbeat(interval_s=1.0, timeout_s=3.0), 0.0, None
    for gap in gaps:
        now += gap
        if heartbeat.should_ask(now) and first_asked is None:
            first_asked = now
            assert now >= 1.0
        assert heartbeat.is_dead(now) == (first_asked is not None and now - first_asked >= 3.0)
