"""Makes the span of a send, which ends with the reply of the mail server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from outbox_server.services.dispatcher.settler import ClaimOutcome, EndedAttempt
from outbox_server.services.dispatcher.storage import MarkedJob
from outbox_server.shared.states import JobState

if TYPE_CHECKING:
    from outbox_server.shared.traces.tracer import Tracer


async def trace_send(
    tracer: Tracer,
    parent: str | None,
    job: MarkedJob,
    send: Callable[[], Awaitable[ClaimOutcome]],
) -> ClaimOutcome:
    """Send, within a span below `parent`. Without a parent, the batch belongs to no trace."""
    if parent is None:
        return await send()
    span = tracer.begin_send(
        parent,
        {
            # As text, because viewers in JavaScript would round them.
            "job_id": str(job.job.job_id),
            "batch_id": str(job.batch_id),
            "sender_id": str(job.sender_id),
            "attempt": job.job.attempt,
        },
    )
    outcome = await send()
    if span is None:
        return outcome
    if not isinstance(outcome, EndedAttempt):
        span.given_back()
        return outcome
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
    return outcome
