"""How claims end, and what that means for PostgreSQL and Redis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from outbox_server.services.dispatcher.cooling import Signal, may_matter
from outbox_server.services.dispatcher.storage import AttemptRecord, MarkedJob
from outbox_server.shared.queue.keys import JobRef
from outbox_server.shared.queue.records import Claim, Contact, LimitUse, Settlement
from outbox_server.shared.states import JobState

_NO_SIGNAL = Signal()


@dataclass(frozen=True, slots=True)
class EndedAttempt:
    """An attempt that was made."""

    record: AttemptRecord
    use: LimitUse
    # The key of the sender's user, as in `Claim`.
    user: str = ""
    # What the attempt says about the endpoint, and the endpoint's name, as in `Settlement`.
    contact: Contact = Contact.NONE
    connection_error: str = ""
    before_mail: bool = False
    server: str = ""
    # What the attempt says about the sender's account.
    signal: Signal = _NO_SIGNAL


@dataclass(frozen=True, slots=True)
class UnsentJob:
    """A marked job that returns to the queue, because its body was not begun.

    `leased` means that Redis still has its lease.
    """

    claim: Claim
    marked: MarkedJob
    leased: bool = True


@dataclass(frozen=True, slots=True)
class UnmarkedClaim:
    """A claim whose job was not marked.

    `waits` means that the job still waits, as far as is known, and returns to the queue: PostgreSQL
    failed, there was no permit, or it is locked or not due. Otherwise it must not be sent: it is
    cancelled or sent already. `unknown` means that PostgreSQL has no such job of this sender, so
    that the sender's whole head may be wrong.
    """

    claim: Claim
    waits: bool = False
    unknown: bool = False


ClaimOutcome = EndedAttempt | UnsentJob | UnmarkedClaim


@dataclass(frozen=True, slots=True)
class Recorded:
    """What PostgreSQL answered when it recorded a group of outcomes.

    `dues` has the due time (Unix ms) of each job that changed its state. `cooldowns` is the result
    of `record_cooldowns`.
    """

    dues: dict[JobRef, int] = field(default_factory=dict)
    cooldowns: dict[JobRef, timedelta] = field(default_factory=dict)


def dues_of(records: Sequence[AttemptRecord], moved: Mapping[int, int]) -> dict[JobRef, int]:
    """Return the due times of the jobs that `settle` moved."""
    return {r.job: moved[r.job.job_id] for r in records if r.job.job_id in moved}


def is_stale(outcome: ClaimOutcome, dues: dict[JobRef, int]) -> bool:
    """Return whether only PostgreSQL knows when the job is due now.

    That is so if this try did not move the job: either its lease had expired, or an earlier try
    moved it and the answer was lost with the connection.
    """
    if isinstance(outcome, EndedAttempt):
        return outcome.record.state is JobState.SCHEDULED and outcome.record.job not in dues
    return isinstance(outcome, UnsentJob) and (not outcome.leased or outcome.marked.job not in dues)


def may_have_cooled(outcome: ClaimOutcome, settlement: Settlement) -> bool:
    """Return whether the sender's cooldown changed, or may have changed.

    It may have if the answer to an earlier try was lost.
    """
    if settlement.cooldown is not None:
        return True
    return isinstance(outcome, EndedAttempt) and may_matter(outcome.record, outcome.signal)


def job_of(outcome: ClaimOutcome) -> JobRef:
    """Return the job and the attempt of a claim."""
    return outcome.record.job if isinstance(outcome, EndedAttempt) else outcome.claim.job


def sender_of(outcome: ClaimOutcome) -> int:
    """Return the sender of a claim."""
    if isinstance(outcome, EndedAttempt):
        return outcome.record.sender_id
    return outcome.claim.sender_id


def settlement_of(outcome: ClaimOutcome, recorded: Recorded, now: float) -> Settlement:
    """Return what Redis is told about a claim that PostgreSQL has recorded."""
    dues = recorded.dues
    if not isinstance(outcome, EndedAttempt):
        claim = outcome.claim
        due: int | None
        if isinstance(outcome, UnsentJob):
            due = dues.get(claim.job) if outcome.leased else None
        else:
            # The job returns to its place in the head. If it no longer waits, the next mark finds
            # out.
            due = claim.due_ms if outcome.waits else None
        return Settlement(
            claim.sender_id,
            claim.job,
            LimitUse.UNUSED,
            user=claim.user,
            next_job=None if due is None else claim.job,
            next_due_ms=due or 0,
            lease_ms=claim.lease_ms,
        )
    record = outcome.record
    due = dues.get(record.job) if record.state is JobState.SCHEDULED else None
    return Settlement(
        record.sender_id,
        record.job,
        outcome.use,
        user=outcome.user,
        age=timedelta(seconds=max(0.0, now - record.ended)),
        next_job=None if due is None else JobRef(record.job.job_id, record.job.attempt + 1),
        next_due_ms=due or 0,
        contact=outcome.contact,
        connection_error=outcome.connection_error,
        before_mail=outcome.before_mail,
        server=outcome.server,
        smtp_code=record.smtp_code,
        cooldown=recorded.cooldowns.get(record.job),
    )
