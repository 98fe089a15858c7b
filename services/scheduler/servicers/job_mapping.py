"""Converts stored jobs and attempts to protos."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from outbox.v1 import email_job_pb2, email_job_service_pb2

from outbox_server.services.scheduler.changes import Made
from outbox_server.services.scheduler.explainer import ExplainedJob
from outbox_server.services.scheduler.explaining import WaitReason
from outbox_server.services.scheduler.storage.email_jobs import JobRecord, PastAttempt
from outbox_server.shared.database.message_ids import message_id_for
from outbox_server.shared.rpc.proto_mapping import id_text, to_timestamp
from outbox_server.shared.states import AttemptOutcome, JobState, ReplyClass

_STATES: Final = {
    state: email_job_pb2.EmailJobState.Value(f"EMAIL_JOB_STATE_{state.name}") for state in JobState
}
_OUTCOMES: Final = {
    outcome: email_job_pb2.AttemptOutcome.Value(f"ATTEMPT_OUTCOME_{outcome.name}")
    for outcome in AttemptOutcome
}
_REPLY_CLASSES: Final[Mapping[ReplyClass | None, email_job_pb2.ReplyClass.ValueType]] = {
    None: email_job_pb2.REPLY_CLASS_UNSPECIFIED,
    **{each: email_job_pb2.ReplyClass.Value(f"REPLY_CLASS_{each.name}") for each in ReplyClass},
}
_REASONS: Final = {
    reason: email_job_service_pb2.WaitReason.Value(f"WAIT_REASON_{reason.name}")
    for reason in WaitReason
}


def changed_job(
    answer: email_job_pb2.EmailJob, was: JobState, *, changed: bool = True
) -> Made[email_job_pb2.EmailJob]:
    """Return what the audit log learns of a job whose state a call has changed."""
    return Made(
        answer,
        f"email-jobs/{answer.email_job_id}",
        answer.user_id,
        before={"state": was.name},
        after={"state": JobState(answer.state).name},
        address=answer.recipient,
        changed=changed,
    )


def to_job(record: JobRecord, installation_id: str) -> email_job_pb2.EmailJob:
    """Return the proto of a job."""
    job = email_job_pb2.EmailJob(
        email_job_id=id_text(record.job_id),
        batch_id=id_text(record.batch_id),
        sender_id=id_text(record.sender_id),
        user_id=record.user_id,
        recipient=record.recipient,
        row_number=record.row_number,
        state=_STATES[record.state],
        create_time=to_timestamp(record.created_at),
        schedule_time=to_timestamp(record.scheduled_at),
        attempt_count=record.attempts,
        message_id=message_id_for(record.job_id, record.message_id_address, installation_id),
        external_id=record.external_id or "",
        labels=record.labels,
        test=record.test,
    )
    if record.finished_at is not None:
        job.finish_time.CopyFrom(to_timestamp(record.finished_at))
        if record.state is JobState.SENT:
            job.send_time.CopyFrom(to_timestamp(record.finished_at))
    if record.last is not None:
        job.last_outcome = _OUTCOMES[record.last.outcome]
        if record.last.outcome is not AttemptOutcome.SENT:
            job.last_error = record.last.message or ""
    return job


def to_attempt(job_id: str, record: PastAttempt) -> email_job_pb2.Attempt:
    """Return the proto of an attempt."""
    return email_job_pb2.Attempt(
        email_job_id=job_id,
        attempt_number=record.number,
        start_time=to_timestamp(record.started_at),
        end_time=to_timestamp(record.ended_at),
        outcome=_OUTCOMES[record.outcome],
        smtp_code=record.smtp_code,
        enhanced_code=record.enhanced_code or "",
        message=record.message or "",
        reply_class=_REPLY_CLASSES[record.reply_class],
        dispatcher_id=record.dispatcher_id or "",
        endpoint=record.endpoint or "",
    )


def to_explanation(
    found: ExplainedJob, installation_id: str
) -> email_job_service_pb2.ExplainEmailJobResponse:
    """Return the proto of an explanation why a job waits."""
    explanation, send_time = found.explanation, found.send_time
    return email_job_service_pb2.ExplainEmailJobResponse(
        email_job=to_job(found.job, installation_id),
        wait_reason=_REASONS[explanation.reason],
        wait_end_time=None if explanation.until is None else to_timestamp(explanation.until),
        ahead_count=found.ahead,
        estimated_send_time=None if send_time is None else to_timestamp(send_time),
        explanation=explanation.text,
    )
