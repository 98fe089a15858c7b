"""Makes the span of a send, which ends with the reply of the mail server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from outbox_server.services.dispatcher.ended_claims import ClaimOutcome, EndedAttempt
from outbox_server.services.dispatcher.storage import MarkedJob
from outbox_server.shared.states import JobState

if TYPE_CHECKING:
    from outbox_server.shared.traces.tracer import SendSpan, Tracer


def begin_span(tracer: Tracer, parent: str | None, job: MarkedJob) -> SendSpan | None:
    """Begin the span of a send, below `parent`. Without a parent, the batch has no trace."""
    if parent is None:
        return None
    return tracer.begin_send(
        parent,
        {
            # Ids are text, because viewers in JavaScript would round numbers.
            "job_id": str(job.job.job_id),
            "batch_id": str(job.batch_id),
            "sender_id": str(job.sender_id),
            "attempt": job.job.attempt,
        },
    )


def end_span(span: SendSpan, outcome: ClaimOutcome) -> None:
    """End the span of a send with its outcome."""
    if not isinstance(outcome, EndedAttempt):
        span.given_back()
        return
    record = outcome.record
    span.ended(
        record.outcome.name,
        server=outcome.server,
        smtp_code=record.smtp_code,
        enhanced_code=record.enhanced_code,
        reply_class=None if record.reply_class is None else record.reply_class.name,
        reply=record.message,
        failed=record.state is JobState.FAILED,
    )
