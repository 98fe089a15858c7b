"""Sends a CSV over gRPC on a running stack, as another backend would do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from outbox.v1.batch_pb2 import Batch, BatchOptions
from outbox.v1.batch_service_pb2 import GetBatchRequest, ScheduleBatchResponse
from outbox.v1.email_job_pb2 import EmailJobState
from outbox.v1.email_job_service_pb2 import ListEmailJobsRequest
from outbox.v1.sender_pb2 import Sender
from outbox.v1.sender_service_pb2 import CreateSenderRequest
from outbox.v1.stats_service_pb2 import GetSenderStatsRequest
from outbox.v1.suppression_pb2 import Suppression
from outbox.v1.suppression_service_pb2 import CreateSuppressionRequest
from outbox_client import AsyncClient, Unavailable, is_open

from outbox_server.cli.demo_report import ExpectedMails
from outbox_server.cli.follow import ended_count, remark_on
from outbox_server.cli.lazy import CommandFailed
from outbox_server.cli.progress import JobProgress

USER: Final = "demo"
_POLL_S: Final = 0.5
# Allowed beyond the wait for the window: a retry, or the restart of a dispatcher.
_PATIENCE_S: Final = 90.0

# A column of the CSV takes precedence over this text.
_SUBJECT: Final = (
    '{% if subject %}{{ subject }}{% else %}Hello {{ first_name | default: "there" }}{% endif %}'
)
_BODY: Final = (
    "{% if body %}{{ body }}{% else %}"
    'Hello {{ first_name | default: "there" }},\n\n'
    "this mail was due with all the others, and waited for its turn.\n{% endif %}"
)


@dataclass
class ScheduledBatch:
    """One sender of the demo, and its batch in its last known state."""

    sender: Sender
    answer: ScheduleBatchResponse
    batch: Batch


class Demo:
    """Makes the gRPC calls of the demo."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def suppress(self, email: str) -> None:
        """Suppress an address for the demo's user."""
        await self._client.suppressions.CreateSuppression(
            CreateSuppressionRequest(
                user_id=USER, suppression=Suppression(email=email, reason="unsubscribed")
            )
        )

    async def schedule(self, sender: Sender, csv: bytes) -> ScheduledBatch:
        """Create a sender, and upload the CSV as its batch."""
        made = await self._client.senders.CreateSender(
            CreateSenderRequest(user_id=USER, sender=sender)
        )
        options = BatchOptions(user_id=USER, sender_id=made.sender_id, subject=_SUBJECT, body=_BODY)
        answer = await self._client.upload(csv, options)
        return ScheduledBatch(made, answer, answer.batch)

    async def follow(self, scheduled: Sequence[ScheduledBatch], window_s: float) -> None:
        """Show progress until every job has ended.

        Raises:
            CommandFailed: no job ended for longer than the limits explain.
        """
        totals = {one.sender.email: one.batch.accepted_count for one in scheduled}
        last, since = -1, time.monotonic()
        with JobProgress(totals) as progress:
            while True:
                for one in scheduled:
                    await self._poll(one, progress)
                ended = sum(ended_count(one.batch.counts) for one in scheduled)
                if not any(is_open(one.batch) for one in scheduled):
                    return
                now = time.monotonic()
                if ended != last:
                    last, since = ended, now
                elif now - since > window_s + _PATIENCE_S:
                    raise CommandFailed(f"no job has ended for {now - since:.0f} s")
                await asyncio.sleep(_POLL_S)

    async def expected(self, one: ScheduledBatch) -> ExpectedMails:
        """Return the mails that must have arrived from a batch whose jobs have all ended."""
        request = ListEmailJobsRequest(batch_id=one.batch.batch_id)
        jobs = [job async for job in self._client.list_email_jobs(request)]
        counts = one.batch.counts
        return ExpectedMails(
            sender_id=one.sender.sender_id,
            email=one.sender.email,
            hourly_limit=one.sender.hourly_limit,
            min_gap_s=one.sender.effective_min_gap.ToTimedelta().total_seconds(),
            accepted=one.batch.accepted_count,
            rejected=one.batch.rejected_count,
            sent=counts.sent_count,
            failed=counts.failed_count,
            message_ids=frozenset(
                job.message_id for job in jobs if job.state != EmailJobState.EMAIL_JOB_STATE_FAILED
            ),
        )

    async def _poll(self, one: ScheduledBatch, progress: JobProgress) -> None:
        try:
            one.batch = await self._client.batches.GetBatch(
                GetBatchRequest(batch_id=one.batch.batch_id)
            )
            stats = await self._client.stats.GetSenderStats(
                GetSenderStatsRequest(sender_id=one.sender.sender_id)
            )
        except Unavailable:
            return  # The next poll asks a restarting service again.
        remarks = [remark_on(one.batch.counts)]
        if stats.waiting_count and stats.window_used_count >= stats.hourly_limit:
            remarks.append(f"waiting: {stats.hourly_limit} of {stats.hourly_limit} in the window")
        progress.update(
            one.sender.email, ended_count(one.batch.counts), ", ".join(filter(None, remarks))
        )
