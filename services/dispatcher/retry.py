"""What becomes of a job after an attempt: pure arithmetic, no clock and no chance of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from shared.states import AttemptOutcome, JobState

# At most a tenth is added to a wait, so that what failed together does not come back together.
JITTER = 0.1


@dataclass(frozen=True, slots=True)
class Verdict:
    """The state that a job goes to; `retry_after` is set when it waits for another attempt."""

    state: JobState
    failures: int
    retry_after: timedelta | None = None


def decide(
    outcome: AttemptOutcome,
    failures: int,
    *,
    backoff: Sequence[timedelta],
    policy: Literal["resend", "hold"],
    chance: float,
) -> Verdict:
    """Return the verdict on a job that had failed `failures` times before this attempt.

    `backoff` is the ladder, one wait a retry; `chance` in [0, 1) picks the jitter.
    """
    if outcome is AttemptOutcome.SENT:
        return Verdict(JobState.SENT, failures)
    if outcome is AttemptOutcome.PERMANENT_FAILURE:
        return Verdict(JobState.FAILED, failures + 1)
    if outcome is AttemptOutcome.IN_DOUBT and policy == "hold":
        return Verdict(JobState.UNCERTAIN, failures)
    if failures >= len(backoff):
        # A copy may have arrived: that is not the same as having failed.
        in_doubt = outcome is AttemptOutcome.IN_DOUBT
        return Verdict(JobState.UNCERTAIN if in_doubt else JobState.FAILED, failures + 1)
    wait = backoff[failures] * (1 + JITTER * chance)
    return Verdict(JobState.SCHEDULED, failures + 1, wait)
