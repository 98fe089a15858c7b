"""Changes of jobs as callers see them."""

from __future__ import annotations

from outbox.v1 import email_job_event_pb2, email_job_pb2

from outbox_server.shared.events.storage import EventOutcome, JobEventRecord
from outbox_server.shared.rpc.proto_mapping import id_text, to_timestamp
from outbox_server.shared.states import AttemptOutcome


def to_job_event(
    event: JobEventRecord, outcome: EventOutcome | None
) -> email_job_event_pb2.EmailJobEvent:
    """Return the proto of a change of a job."""
    proto = email_job_event_pb2.EmailJobEvent(
        email_job_event_id=id_text(event.event_id),
        event_time=to_timestamp(event.happened_at),
        email_job_id="" if event.job_id is None else id_text(event.job_id),
        batch_id=id_text(event.batch_id),
        sender_id=id_text(event.sender_id),
        user_id=event.user_id,
        state=email_job_pb2.EmailJobState.Value(f"EMAIL_JOB_STATE_{event.state.name}"),
        attempt_count=event.attempt,
        job_count=event.job_count or 0,
    )
    if event.due_at is not None:
        proto.schedule_time.CopyFrom(to_timestamp(event.due_at))
    if outcome is None:
        return proto
    proto.last_outcome = email_job_pb2.AttemptOutcome.Value(
        f"ATTEMPT_OUTCOME_{outcome.outcome.name}"
    )
    if outcome.reply_class is not None:
        proto.reply_class = email_job_pb2.ReplyClass.Value(
            f"REPLY_CLASS_{outcome.reply_class.name}"
        )
    proto.smtp_code = outcome.smtp_code or 0
    proto.enhanced_code = outcome.enhanced_code or ""
    if outcome.outcome is not AttemptOutcome.SENT:
        proto.last_error = outcome.message or ""
    return proto
