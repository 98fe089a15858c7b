"""The main job, as another backend would do it: over gRPC, on a stack that runs."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Final

import grpc
from outbox.v1.batch_pb2 import Batch, BatchOptions
from outbox.v1.batch_service_pb2 import GetBatchRequest, ScheduleBatchResponse, UploadBatchRequest
from outbox.v1.batch_service_pb2_grpc import BatchServiceStub
from outbox.v1.email_job_pb2 import EmailJob, JobState
from outbox.v1.email_job_service_pb2 import ListEmailJobsRequest
from outbox.v1.email_job_service_pb2_grpc import EmailJobServiceStub
from outbox.v1.sender_pb2 import Sender
from outbox.v1.sender_service_pb2 import CreateSenderRequest
from outbox.v1.sender_service_pb2_grpc import SenderServiceStub
from outbox.v1.stats_service_pb2 import GetSenderStatsRequest
from outbox.v1.stats_service_pb2_grpc import StatsServiceStub
from outbox.v1.suppression_pb2 import Suppression
from outbox.v1.suppression_service_pb2 import CreateSuppressionRequest
from outbox.v1.suppression_service_pb2_grpc import SuppressionServiceStub

from cli.client import TIMEOUT_S, UPLOAD_TIMEOUT_S
from cli.demo_report import Expected
from cli.follow import POLL_S, ended_count, is_open, remark_on
from cli.lazy import CommandFailed
from cli.progress import JobProgress

USER: Final = "demo"
_CHUNK_BYTES: Final = 64 * 1024
_PAGE: Final = 1000
# Beside what the window alone may hold up: a retry, a dispatcher that is started again.
_PATIENCE_S: Final = 90.0

# A column of the CSV goes before our text.
_SUBJECT: Final = (
    '{% if subject %}{{ subject }}{% else %}Hello {{ first_name | default: "there" }}{% endif %}'
)
_BODY: Final = (
    "{% if body %}{{ body }}{% else %}"
    'Hello {{ first_name | default: "there" }},\n\n'
    "this mail was due with all the others, and waited for its turn.\n{% endif %}"
)


@dataclass
class Scheduled:
    """One sender of the demo and its batch, as it was seen last."""

    sender: Sender
    answer: ScheduleBatchResponse
    batch: Batch


class Demo:
    """The calls of the demo. Open while the channels are."""

    def __init__(self, scheduler: grpc.aio.Channel, stats: grpc.aio.Channel) -> None:
        self._senders = SenderServiceStub(scheduler)
        self._batches = BatchServiceStub(scheduler)
        self._jobs = EmailJobServiceStub(scheduler)
        self._suppressions = SuppressionServiceStub(scheduler)
        self._stats = StatsServiceStub(stats)

    async def suppress(self, email: str) -> None:
        """Let no mail of the demo's user go to an address."""
        await self._suppressions.CreateSuppression(
            CreateSuppressionRequest(
                user_id=USER, suppression=Suppression(email=email, reason="unsubscribed")
            ),
            timeout=TIMEOUT_S,
        )

    async def schedule(self, sender: Sender, csv: bytes) -> Scheduled:
        """Create a sender and upload the CSV as a batch of it."""
        made = await self._senders.CreateSender(
            CreateSenderRequest(user_id=USER, sender=sender), timeout=TIMEOUT_S
        )
        options = BatchOptions(
            request_id=str(uuid.uuid4()),
            user_id=USER,
            sender_id=made.sender_id,
            subject=_SUBJECT,
            body=_BODY,
        )
        answer = await self._batches.UploadBatch(_messages(options, csv), timeout=UPLOAD_TIMEOUT_S)
        return Scheduled(made, answer, answer.batch)

    async def follow(self, scheduled: Sequence[Scheduled], window_s: float) -> None:
        """Show progress until every job has ended.

        Raises:
            CommandFailed: nothing ended for longer than the limits explain.
        """
        totals = {one.sender.email: one.batch.accepted_count for one in scheduled}
        last, since = -1, time.monotonic()
        with JobProgress(totals) as progress:
            while True:
                for one in scheduled:
                    await self._look(one, progress)
                ended = sum(ended_count(one.batch.counts) for one in scheduled)
                if not any(is_open(one.batch) for one in scheduled):
                    return
                now = time.monotonic()
                if ended != last:
                    last, since = ended, now
                elif now - since > window_s + _PATIENCE_S:
                    raise CommandFailed(f"no job has ended for {now - since:.0f} s")
                await asyncio.sleep(POLL_S)

    async def expected(self, one: Scheduled) -> Expected:
        """Return what must have arrived of a batch whose jobs have all ended."""
        jobs = [job async for job in self._all_jobs(one.batch.batch_id)]
        counts = one.batch.counts
        return Expected(
            sender_id=one.sender.sender_id,
            email=one.sender.email,
            hourly_limit=one.sender.hourly_limit,
            min_gap_s=one.sender.effective_min_gap.ToTimedelta().total_seconds(),
            accepted=one.batch.accepted_count,
            rejected=one.batch.rejected_count,
            sent=counts.sent_count,
            failed=counts.failed_count,
            message_ids=frozenset(
                job.message_id for job in jobs if job.state != JobState.JOB_STATE_FAILED
            ),
        )

    async def _look(self, one: Scheduled, progress: JobProgress) -> None:
        try:
            one.batch = await self._batches.GetBatch(
                GetBatchRequest(batch_id=one.batch.batch_id), timeout=TIMEOUT_S
            )
            stats = await self._stats.GetSenderStats(
                GetSenderStatsRequest(sender_id=one.sender.sender_id), timeout=TIMEOUT_S
            )
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            return  # a service that is started again is asked again
        remarks = [remark_on(one.batch.counts)]
        if stats.waiting_count and stats.window_used_count >= stats.hourly_limit:
            remarks.append(f"waits: {stats.hourly_limit} of {stats.hourly_limit} in the window")
        progress.update(
            one.sender.email, ended_count(one.batch.counts), ", ".join(filter(None, remarks))
        )

    async def _all_jobs(self, batch_id: str) -> AsyncIterator[EmailJob]:
        token = ""
        while True:
            page = await self._jobs.ListEmailJobs(
                ListEmailJobsRequest(batch_id=batch_id, page_size=_PAGE, page_token=token),
                timeout=TIMEOUT_S,
            )
            for job in page.email_jobs:
                yield job
            token = page.next_page_token
            if not token:
                return


async def _messages(options: BatchOptions, csv: bytes) -> AsyncIterator[UploadBatchRequest]:
    yield UploadBatchRequest(options=options)
    for start in range(0, len(csv), _CHUNK_BYTES):
        yield UploadBatchRequest(chunk=csv[start : start + _CHUNK_BYTES])
