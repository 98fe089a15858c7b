"""Turns the result of a send into the outcome that PostgreSQL and Redis record."""

from __future__ import annotations

import random
import time
from datetime import timedelta

from outbox_server.services.dispatcher.cooling import Signal
from outbox_server.services.dispatcher.ended_claims import EndedAttempt, UnsentJob
from outbox_server.services.dispatcher.renewer import LeasedJob
from outbox_server.services.dispatcher.retry import Backoffs, Decision, JobAttempt, decide
from outbox_server.services.dispatcher.smtp import SendResult
from outbox_server.services.dispatcher.storage import AttemptRecord, MarkedJob
from outbox_server.shared.queue.records import Claim, Contact, LimitUse
from outbox_server.shared.settings import Settings
from outbox_server.shared.states import CONNECTION_TROUBLE, AttemptOutcome, JobState, ReplyClass


class OutcomeRules:
    """Decides the state of a job after an attempt, by the operator's settings."""

    def __init__(self, settings: Settings) -> None:
        self._backoffs = Backoffs(
            settings.retry_backoff, settings.defer_backoff, settings.defer_for
        )
        self._policy = settings.uncertain_policy

    def ended(
        self,
        claim: Claim,
        job: MarkedJob,
        result: SendResult,
        *,
        late: timedelta,
        server: str,
        endpoint: str | None = None,
    ) -> EndedAttempt:
        """Return the outcome of an attempt at `job`.

        `late` is the time from when the limits allowed the send until it began. `server` is the
        host and the port, as shown in logs, and `endpoint` is what callers are shown (see
        `AttemptRecord`).
        """
        decision = decide(
            JobAttempt(
                attempt=job.job.attempt,
                outcome=result.outcome,
                reply_class=result.reply_class,
                failures=job.failures,
                deferred_for=job.deferred_for,
                probe=claim.probe,
                mail_begun=result.mail_begun,
            ),
            backoffs=self._backoffs,
            policy=self._policy,
            chance=random.random(),  # noqa: S311 - jitter
        )
        return EndedAttempt(
            _record(job, result, decision, late, endpoint),
            LimitUse.COUNTED if result.body_begun else LimitUse.BEGUN,
            user=claim.user,
            contact=contact_of(result),
            connection_error=result.message or result.outcome.name,
            before_mail=not result.mail_begun,
            server=server,
            signal=Signal(refused=decision.cools_down, daily=result.daily, probe=claim.probe),
        )

    def given_back(self, leased: LeasedJob, started: float) -> UnsentJob | EndedAttempt:
        """Return the outcome of a send that stopped before the body. The job is due again at once.

        Giving a job back compares the end of its lease. If a renewal may have moved that end, the
        job cannot be given back. The send is then recorded as an attempt that uses no step of the
        backoff. `started` is a value of `time.monotonic`.
        """
        if leased.known:
            return UnsentJob(leased.claim, leased.marked)
        result = result_without_smtp(
            AttemptOutcome.TEMPORARY_FAILURE,
            "stopped before the body: the renewal of the lease was not confirmed",
            started,
        )
        decision = Decision(JobState.SCHEDULED, leased.marked.failures, timedelta(0))
        record = _record(leased.marked, result, decision, None)
        return EndedAttempt(record, LimitUse.BEGUN, user=leased.claim.user)


def _record(
    job: MarkedJob,
    result: SendResult,
    decision: Decision,
    late: timedelta | None,
    endpoint: str | None = None,
) -> AttemptRecord:
    return AttemptRecord(
        job=job.job,
        sender_id=job.sender_id,
        state=decision.state,
        failures=decision.failures,
        outcome=result.outcome,
        counted=result.body_begun,
        started=result.started,
        ended=result.ended,
        retry_after=decision.retry_after,
        late=late,
        smtp_code=result.smtp_code,
        enhanced_code=result.enhanced_code,
        message=result.message,
        reply_class=result.reply_class,
        deferred=decision.deferred,
        endpoint=endpoint,
    )


def result_without_smtp(outcome: AttemptOutcome, message: str, started: float) -> SendResult:
    """Return the result of a send that ends now and that has no reply of a server."""
    return SendResult(
        outcome, body_begun=False, started=started, ended=time.monotonic(), message=message
    )


def contact_of(result: SendResult) -> Contact:
    """Return what an attempt says about its endpoint."""
    if result.reply_class is ReplyClass.AUTH:
        return Contact.AUTH_FAILED
    if result.outcome in CONNECTION_TROUBLE:
        return Contact.FAILED
    if result.outcome is AttemptOutcome.SENT:
        return Contact.ACCEPTED
    if result.reply_class is ReplyClass.RATE:
        return Contact.TOO_FAST
    # Without a code, the server was not involved.
    return Contact.NONE if result.smtp_code is None else Contact.ANSWERED
