"""The decision about a job after an attempt."""

from __future__ import annotations

from datetime import timedelta
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox_server.services.dispatcher.retry import JITTER, Backoffs, Decision, JobAttempt, decide
from outbox_server.shared.states import NOT_COUNTED, AttemptOutcome, JobState, ReplyClass

BACKOFF = (timedelta(seconds=5), timedelta(seconds=25), timedelta(seconds=125))
DEFERRALS = tuple(timedelta(minutes=minutes) for minutes in (5, 10, 20, 40, 60))
DEFER_FOR = timedelta(hours=24)
NO_WAIT = timedelta(0)
RETRIED = (
    AttemptOutcome.TEMPORARY_FAILURE,
    AttemptOutcome.CONNECTION_FAILURE,
    AttemptOutcome.IN_DOUBT,
)
Policy = Literal["resend", "hold"]


def decision(
    outcome: AttemptOutcome,
    failures: int = 0,
    *,
    backoff: tuple[timedelta, ...] = BACKOFF,
    policy: Policy = "resend",
    chance: float = 0.0,
) -> Decision:
    tried = JobAttempt(attempt=failures + 1, outcome=outcome, failures=failures)
    return decide(
        tried, backoffs=Backoffs(backoff, DEFERRALS, DEFER_FOR), policy=policy, chance=chance
    )


def answered(
    reply_class: ReplyClass,
    outcome: AttemptOutcome = AttemptOutcome.TEMPORARY_FAILURE,
    *,
    attempt: int = 1,
    failures: int = 0,
    deferred_for: timedelta | None = None,
    probe: bool = False,
    chance: float = 0.0,
) -> Decision:
    """Return the decision after a reply of this class."""
    tried = JobAttempt(attempt, outcome, reply_class, failures, deferred_for, probe)
    backoffs = Backoffs(BACKOFF, DEFERRALS, DEFER_FOR)
    return decide(tried, backoffs=backoffs, policy="resend", chance=chance)


@pytest.mark.parametrize("policy", ["resend", "hold"])
@pytest.mark.parametrize("failures", [0, 1, 3, 9])
def test_a_sent_mail_is_final_regardless_of_earlier_failures(policy: Policy, failures: int) -> None:
    assert decision(AttemptOutcome.SENT, failures, policy=policy) == Decision(
        JobState.SENT, failures
    )


@pytest.mark.parametrize("failures", [0, 1, 3])
def test_a_permanent_failure_is_final_at_once(failures: int) -> None:
    assert decision(AttemptOutcome.PERMANENT_FAILURE, failures) == Decision(
        JobState.FAILED, failures + 1
    )


@pytest.mark.parametrize("outcome", RETRIED)
def test_each_failure_takes_one_step_of_the_backoff(outcome: AttemptOutcome) -> None:
    for failures, wait in enumerate(BACKOFF):
        assert decision(outcome, failures) == Decision(JobState.SCHEDULED, failures + 1, wait)


@pytest.mark.parametrize(
    ("outcome", "state"),
    [
        (AttemptOutcome.TEMPORARY_FAILURE, JobState.FAILED),
        (AttemptOutcome.CONNECTION_FAILURE, JobState.FAILED),
        # A copy may have arrived.
        (AttemptOutcome.IN_DOUBT, JobState.UNCERTAIN),
    ],
)
def test_after_the_last_step_a_job_has_failed_or_is_uncertain(
    outcome: AttemptOutcome, state: JobState
) -> None:
    assert decision(outcome, len(BACKOFF)) == Decision(state, len(BACKOFF) + 1)
    assert decision(outcome, backoff=()) == Decision(state, 1)


@pytest.mark.parametrize("failures", [0, 2, 3])
def test_a_mail_in_doubt_waits_for_a_decision_under_hold(failures: int) -> None:
    held = decision(AttemptOutcome.IN_DOUBT, failures, policy="hold")

    assert held == Decision(JobState.UNCERTAIN, failures)


@pytest.mark.parametrize("outcome", RETRIED[:2])
def test_hold_does_not_change_known_failures(outcome: AttemptOutcome) -> None:
    for failures in range(len(BACKOFF) + 2):
        assert decision(outcome, failures, policy="hold") == decision(outcome, failures)


@given(
    outcome=st.sampled_from(RETRIED),
    failures=st.integers(0, 2),
    chance=st.floats(0, 1, exclude_max=True),
)
def test_jitter_never_shortens_a_wait_and_adds_a_tenth_at_most(
    outcome: AttemptOutcome, failures: int, chance: float
) -> None:
    waited = decision(outcome, failures, chance=chance).retry_after

    assert waited is not None
    assert BACKOFF[failures] <= waited <= BACKOFF[failures] * (1 + JITTER)


def test_jitter_is_random() -> None:
    waits = {
        decision(AttemptOutcome.TEMPORARY_FAILURE, chance=chance).retry_after
        for chance in (0.0, 0.25, 0.5, 0.75)
    }
    assert len(waits) == 4


@given(
    outcome=st.sampled_from(AttemptOutcome),
    failures=st.integers(0, 10),
    steps=st.integers(0, 5),
    policy=st.sampled_from(["resend", "hold"]),
)
def test_only_scheduled_jobs_have_a_wait(
    outcome: AttemptOutcome, failures: int, steps: int, policy: Policy
) -> None:
    decided = decision(outcome, failures, backoff=(timedelta(seconds=1),) * steps, policy=policy)

    assert (decided.retry_after is not None) == (decided.state is JobState.SCHEDULED)
    assert decided.failures in (failures, failures + 1)


@pytest.mark.parametrize("reply_class", sorted(NOT_COUNTED))
@pytest.mark.parametrize("failures", [0, 3, 50])
def test_a_refusal_unrelated_to_the_mail_uses_no_attempt(
    reply_class: ReplyClass, failures: int
) -> None:
    decided = answered(reply_class, failures=failures)

    assert (decided.state, decided.failures) == (JobState.SCHEDULED, failures)


def test_a_refused_account_starts_a_cooldown_of_the_sender_and_does_not_fail_the_job() -> None:
    decided = answered(ReplyClass.ACCOUNT)

    assert decided == Decision(JobState.SCHEDULED, 0, NO_WAIT, cools_down=True)


def test_a_refused_password_waits_for_the_first_step_each_time() -> None:
    waits = {
        answered(ReplyClass.AUTH, AttemptOutcome.CONNECTION_FAILURE, failures=n).retry_after
        for n in (0, 1, 7)
    }
    assert waits == {BACKOFF[0]}


def test_an_unknown_refusal_fails_the_job_unless_it_is_the_probe_of_a_cooldown() -> None:
    refused = AttemptOutcome.PERMANENT_FAILURE

    assert answered(ReplyClass.REFUSED, refused) == Decision(JobState.FAILED, 1)
    assert answered(ReplyClass.REFUSED, refused, probe=True) == Decision(
        JobState.SCHEDULED, 0, NO_WAIT, cools_down=True
    )


@pytest.mark.parametrize("reply_class", [ReplyClass.RECIPIENT, ReplyClass.CONTENT])
def test_a_probe_whose_mail_is_refused_fails_and_does_not_count_against_the_account(
    reply_class: ReplyClass,
) -> None:
    decided = answered(reply_class, AttemptOutcome.PERMANENT_FAILURE, probe=True)

    assert decided == Decision(JobState.FAILED, 1)


def test_a_deferred_job_has_a_backoff_of_its_own_and_the_last_step_repeats() -> None:
    gone, waits = timedelta(0), []
    for _ in range(7):
        wait = answered(ReplyClass.DEFERRED, failures=2, deferred_for=gone).retry_after
        assert wait is not None
        waits.append(wait)
        # A little more time than the wait has passed when the next attempt ends.
        gone += wait + timedelta(seconds=3)

    assert waits == [*DEFERRALS, DEFERRALS[-1], DEFERRALS[-1]]


@given(
    gone=st.timedeltas(timedelta(0), timedelta(days=3)),
    chance=st.floats(0, 1, exclude_max=True),
)
def test_a_deferred_job_is_retried_only_until_its_time_limit(
    gone: timedelta, chance: float
) -> None:
    decided = answered(ReplyClass.DEFERRED, deferred_for=gone, chance=chance)

    if gone >= DEFER_FOR:
        assert decided == Decision(JobState.FAILED, 1, deferred=True)
    else:
        assert decided.state is JobState.SCHEDULED
        assert decided.failures == 0
        assert decided.retry_after is not None
        assert gone + decided.retry_after <= DEFER_FOR


@pytest.mark.parametrize("reply_class", [ReplyClass.RATE, ReplyClass.ACCOUNT, ReplyClass.AUTH])
def test_the_number_of_attempts_does_not_overflow_its_column(reply_class: ReplyClass) -> None:
    assert answered(reply_class, attempt=31_999).state is JobState.SCHEDULED
    assert answered(reply_class, attempt=32_000).state is JobState.FAILED


@pytest.mark.parametrize("failures", [0, 3, 50])
def test_a_server_that_is_not_reached_uses_no_attempt(failures: int) -> None:
    tried = JobAttempt(
        attempt=failures + 1,
        outcome=AttemptOutcome.CONNECTION_FAILURE,
        failures=failures,
        mail_begun=False,
    )
    backoffs = Backoffs(BACKOFF, DEFERRALS, DEFER_FOR)

    decided = decide(tried, backoffs=backoffs, policy="resend", chance=0.0)

    assert decided == Decision(JobState.SCHEDULED, failures, BACKOFF[0])


@pytest.mark.parametrize(
    "reply_class", [ReplyClass.SESSION, ReplyClass.TEMPORARY, ReplyClass.DEFERRED]
)
def test_a_server_that_refuses_the_session_uses_no_attempt(reply_class: ReplyClass) -> None:
    decided = answered(reply_class, AttemptOutcome.CONNECTION_FAILURE, failures=3)

    assert (decided.state, decided.failures) == (JobState.SCHEDULED, 3)
