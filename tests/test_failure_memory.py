"""What a client remembers of failures: penalties that grow and fade, one trial at a time, and forgiveness."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.routing import FailureMemory, FailurePolicy, Standing

PENALTY_S = 15.0
POLICY = FailurePolicy()


def failed_at(*times: float) -> FailureMemory:
    memory = FailureMemory(POLICY)
    for now in times:
        memory.failed("peer", now, PENALTY_S, "gone")
    return memory


def penalty_s(memory: FailureMemory, now: float) -> float:
    """How long it is left alone from `now` on, to a tenth of a second."""
    tenths = 0
    while memory.standing("peer", now + tenths / 10) in (Standing.FAILED_NOW, Standing.FAILED_LATELY):
        tenths += 1
    return tenths / 10


def test_a_server_of_which_nothing_is_known_is_good() -> None:
    assert FailureMemory().standing("peer", 0.0) is Standing.GOOD
    assert FailureMemory().expected_loss_s("peer", 0.0) == 0


def test_a_server_that_failed_is_left_alone_but_for_those_who_have_no_other_way() -> None:
    memory = failed_at(100.0)
    assert memory.standing("peer", 100.5) is Standing.FAILED_NOW
    assert memory.standing("peer", 101.0) is Standing.FAILED_LATELY
    assert memory.standing("peer", 114.9) is Standing.FAILED_LATELY
    assert memory.reason("peer") == "gone"


def test_then_one_session_tries_it_and_the_others_wait_for_what_becomes_of_that() -> None:
    memory = failed_at(100.0)
    assert memory.standing("peer", 115.0, "one") is memory.standing("peer", 115.0, "two") is Standing.MAY_BE_TRIED
    memory.chosen("peer", 115.0, "one")
    assert memory.standing("peer", 115.1, "one") is Standing.MAY_BE_TRIED
    assert memory.standing("peer", 115.1, "two") is Standing.ON_TRIAL
    memory.chosen("peer", 115.1, "two")  # for want of another way: that does not make it the trial
    assert memory.standing("peer", 115.2, "one") is Standing.MAY_BE_TRIED
    assert memory.standing("peer", 115.0 + POLICY.trial_s, "two") is Standing.MAY_BE_TRIED  # nothing was heard of it


def test_success_clears_and_failure_doubles() -> None:
    memory = failed_at(100.0)
    memory.chosen("peer", 115.0, "one")
    memory.failed("peer", 115.0, PENALTY_S, "gone again")
    assert penalty_s(memory, 115.0) == 2 * PENALTY_S
    memory.chosen("peer", 145.0, "one")
    memory.succeeded("peer", since=145.0)
    assert memory.standing("peer", 145.0) is Standing.GOOD
    memory.failed("peer", 150.0, PENALTY_S, "gone once more")
    assert penalty_s(memory, 150.0) == PENALTY_S


def test_the_success_of_a_session_that_was_there_before_the_failure_says_nothing() -> None:
    memory = failed_at(100.0)
    memory.succeeded("peer", since=99.0)
    assert memory.standing("peer", 100.5) is Standing.FAILED_NOW


def test_sessions_that_lose_a_server_together_count_as_one_failure() -> None:
    assert penalty_s(failed_at(100.0, 100.01, 100.02), 100.02) == PENALTY_S


def test_a_lesser_failure_does_not_shorten_a_penalty() -> None:
    memory = failed_at(100.0)
    memory.failed("peer", 101.0, 5.0, "refused")
    assert penalty_s(memory, 101.0) == 14.0


def test_old_failures_fade() -> None:
    memory = failed_at(100.0)
    losses = [memory.expected_loss_s("peer", now) for now in (115.0, 175.0, 235.0)]
    assert losses == [1.0, 0.5, 0.25]
    assert memory.standing("peer", 240.0) is Standing.GOOD
    assert memory.expected_loss_s("peer", 240.0) == 0


@given(st.lists(st.tuples(st.floats(0, 2000), st.sampled_from([5.0, 15.0]), st.booleans()), max_size=40))
@settings(deadline=None)
def test_whatever_happens_a_server_is_never_out_of_reach_for_longer_than_a_moment(
    events: list[tuple[float, float, bool]],
) -> None:
    memory, now = FailureMemory(POLICY), 0.0
    for pause_s, seconds, works in events:
        now += pause_s
        memory.chosen("peer", now, "session")
        if works:
            memory.succeeded("peer", since=now)
            assert memory.standing("peer", now) is Standing.GOOD
        else:
            memory.failed("peer", now, seconds, "gone")
            assert memory.standing("peer", now + POLICY.second_chance_s) is not Standing.FAILED_NOW
            assert memory.standing("peer", now + POLICY.longest_s) in (Standing.GOOD, Standing.MAY_BE_TRIED)
