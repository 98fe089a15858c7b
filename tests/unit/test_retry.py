"""What becomes of a job after an attempt."""

from __future__ import annotations

from datetime import timedelta
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.dispatcher.retry import JITTER, Verdict, decide
from shared.states import AttemptOutcome, JobState

LADDER = (timedelta(seconds=5), timedelta(seconds=25), timedelta(seconds=125))
RETRIED = (
    AttemptOutcome.TEMPORARY_FAILURE,
    AttemptOutcome.CONNECTION_FAILURE,
    AttemptOutcome.IN_DOUBT,
)
Policy = Literal["resend", "hold"]


def verdict(
    outcome: AttemptOutcome,
    failures: int = 0,
    *,
    backoff: tuple[timedelta, ...] = LADDER,
    policy: Policy = "resend",
    chance: float = 0.0,
) -> Verdict:
    return decide(outcome, failures, backoff=backoff, policy=policy, chance=chance)


@pytest.mark.parametrize("policy", ["resend", "hold"])
@pytest.mark.parametrize("failures", [0, 1, 3, 9])
def test_what_was_sent_is_sent_whatever_failed_before(policy: Policy, failures: int) -> None:
    assert verdict(AttemptOutcome.SENT, failures, policy=policy) == Verdict(JobState.SENT, failures)


@pytest.mark.parametrize("failures", [0, 1, 3])
def test_a_permanent_failure_is_final_at_once(failures: int) -> None:
    assert verdict(AttemptOutcome.PERMANENT_FAILURE, failures) == Verdict(
        JobState.FAILED, failures + 1
    )


@pytest.mark.parametrize("outcome", RETRIED)
def test_the_ladder_is_climbed_step_by_step(outcome: AttemptOutcome) -> None:
    for failures, wait in enumerate(LADDER):
        assert verdict(outcome, failures) == Verdict(JobState.SCHEDULED, failures + 1, wait)


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
    assert verdict(outcome, len(LADDER)) == Verdict(state, len(LADDER) + 1)
    assert verdict(outcome, backoff=()) == Verdict(state, 1)


@pytest.mark.parametrize("failures", [0, 2, 3])
def test_in_doubt_under_hold_waits_for_a_decision(failures: int) -> None:
    held = verdict(AttemptOutcome.IN_DOUBT, failures, policy="hold")

    assert held == Verdict(JobState.UNCERTAIN, failures)


@pytest.mark.parametrize("outcome", RETRIED[:2])
def test_hold_changes_nothing_for_a_failure_that_is_known(outcome: AttemptOutcome) -> None:
    for failures in range(len(LADDER) + 2):
        assert verdict(outcome, failures, policy="hold") == verdict(outcome, failures)


@given(
    outcome=st.sampled_from(RETRIED),
    failures=st.integers(0, 2),
    chance=st.floats(0, 1, exclude_max=True),
)
def test_jitter_never_shortens_a_wait_and_adds_a_tenth_at_most(
    outcome: AttemptOutcome, failures: int, chance: float
) -> None:
    waited = verdict(outcome, failures, chance=chance).retry_after

    assert waited is not None
    assert LADDER[failures] <= waited <= LADDER[failures] * (1 + JITTER)


def test_jitter_differs_with_chance() -> None:
    waits = {
        verdict(AttemptOutcome.TEMPORARY_FAILURE, chance=chance).retry_after
        for chance in (0.0, 0.25, 0.5, 0.75)
    }
    assert len(waits) == 4


@given(
    outcome=st.sampled_from(AttemptOutcome),
    failures=st.integers(0, 10),
    steps=st.integers(0, 5),
    policy=st.sampled_from(["resend", "hold"]),
)
def test_a_wait_goes_with_scheduled_and_with_nothing_else(
    outcome: AttemptOutcome, failures: int, steps: int, policy: Policy
) -> None:
    decided = verdict(outcome, failures, backoff=(timedelta(seconds=1),) * steps, policy=policy)

    assert (decided.retry_after is not None) == (decided.state is JobState.SCHEDULED)
    assert decided.failures in (failures, failures + 1)
