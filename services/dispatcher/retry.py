"""Decides the state of a job after an attempt. Pure: callers pass times and random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate
from typing import Literal

from outbox_server.shared.states import NOT_COUNTED, AttemptOutcome, JobState, ReplyClass

# A wait becomes up to a tenth longer, so that jobs that failed together are not retried together.
JITTER = 0.1
# A job with this many attempts is given up: the database column for attempts ends at 32,767.
_MOST_ATTEMPTS = 32_000
# The wait if OUTBOX_RETRY_BACKOFF is empty.
_SHORT_WAIT = timedelta(seconds=5)
_NO_WAIT = timedelta(0)


@dataclass(frozen=True, slots=True)
class Backoffs:
    """The waits before further attempts, from the settings of the same names."""

    retry_backoff: Sequence[timedelta]
    defer_backoff: Sequence[timedelta]
    defer_for: timedelta


@dataclass(frozen=True, slots=True)
class JobAttempt:
    """One attempt that ended, and the history of its job.

    `attempt` is its number, from 1. `failures` counts earlier attempts that used a step of the
    backoff. `deferred_for` is the time since the server first deferred the mail; None means that it
    never did.
    """

    attempt: int
    outcome: AttemptOutcome
    reply_class: ReplyClass | None = None
    failures: int = 0
    deferred_for: timedelta | None = None
    # The sender was cooling down, and this attempt was its probe.
    probe: bool = False
    # Whether MAIL was sent for this mail.
    mail_begun: bool = True


@dataclass(frozen=True, slots=True)
class Decision:
    """The new state of a job. `retry_after` is None unless it waits for another attempt."""

    state: JobState
    failures: int
    retry_after: timedelta | None = None
    # The server deferred the mail. OUTBOX_DEFER_FOR counts from the first such attempt.
    deferred: bool = False
    # The sender's account was refused: it cools down.
    cools_down: bool = False


def decide(
    tried: JobAttempt, *, backoffs: Backoffs, policy: Literal["resend", "hold"], chance: float
) -> Decision:
    """Return the decision about a job after an attempt; `chance` in [0, 1) picks the jitter."""
    if tried.outcome is AttemptOutcome.SENT:
        return Decision(JobState.SENT, tried.failures)
    # If no rule knows the reply that refused a probe, the account counts as still refused.
    probe_refused = tried.probe and tried.reply_class is ReplyClass.REFUSED
    permanent = tried.outcome is AttemptOutcome.PERMANENT_FAILURE and not probe_refused
    if permanent or tried.attempt >= _MOST_ATTEMPTS:
        return Decision(JobState.FAILED, tried.failures + 1)
    stretch = 1 + JITTER * chance
    # MAIL was not sent: the server was not reached, or it refused the session.
    no_session = tried.outcome is AttemptOutcome.CONNECTION_FAILURE and (
        tried.reply_class is not None or not tried.mail_begun
    )
    if probe_refused or no_session or tried.reply_class in NOT_COUNTED:
        return _not_counted(tried, backoffs, stretch, cools_down=probe_refused)
    if tried.reply_class is ReplyClass.DEFERRED:
        return _deferred(tried, backoffs, stretch)
    return _counted(tried, backoffs.retry_backoff, stretch, policy)


def _not_counted(
    tried: JobAttempt, backoffs: Backoffs, stretch: float, *, cools_down: bool
) -> Decision:
    """Return the decision about a job whose refusal says nothing about the mail."""
    if cools_down or tried.reply_class is ReplyClass.ACCOUNT:
        return Decision(JobState.SCHEDULED, tried.failures, _NO_WAIT, cools_down=True)
    if tried.reply_class is ReplyClass.RATE:
        # The sender's gap holds it back.
        return Decision(JobState.SCHEDULED, tried.failures, _NO_WAIT)
    backoff = backoffs.retry_backoff or (_SHORT_WAIT,)
    return Decision(JobState.SCHEDULED, tried.failures, backoff[0] * stretch)


def _counted(
    tried: JobAttempt,
    backoff: Sequence[timedelta],
    stretch: float,
    policy: Literal["resend", "hold"],
) -> Decision:
    """Return the decision about a job whose attempt uses a step of the backoff."""
    failures = tried.failures
    in_doubt = tried.outcome is AttemptOutcome.IN_DOUBT
    if in_doubt and policy == "hold":
        return Decision(JobState.UNCERTAIN, failures)
    if failures >= len(backoff):
        # A copy may have arrived, so the job must not be reported as FAILED.
        return Decision(JobState.UNCERTAIN if in_doubt else JobState.FAILED, failures + 1)
    return Decision(JobState.SCHEDULED, failures + 1, backoff[failures] * stretch)


def _deferred(tried: JobAttempt, backoffs: Backoffs, stretch: float) -> Decision:
    """Return the decision about a job that the server deferred.

    The step of the backoff is the first one that ends after the time since the first deferral. The
    last attempt is made when OUTBOX_DEFER_FOR is over.
    """
    gone = tried.deferred_for or _NO_WAIT
    left = backoffs.defer_for - gone
    if left <= _NO_WAIT:
        return Decision(JobState.FAILED, tried.failures + 1, deferred=True)
    ends = accumulate(backoffs.defer_backoff)
    steps = zip(backoffs.defer_backoff, ends, strict=True)
    wait = next((wait for wait, end in steps if end > gone), backoffs.defer_backoff[-1])
    return Decision(JobState.SCHEDULED, tried.failures, min(wait * stretch, left), deferred=True)
