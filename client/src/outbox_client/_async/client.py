"""The client: the stubs of all services, with uploads, watches and paging for convenience."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from datetime import timedelta
from typing import Any, Final

from outbox.v1.api_key_pb2 import ApiKey
from outbox.v1.api_key_service_pb2 import ListApiKeysRequest
from outbox.v1.audit_pb2 import AuditEvent
from outbox.v1.audit_service_pb2 import ListAuditEventsRequest
from outbox.v1.batch_pb2 import Batch, BatchOptions, BatchState, Rejection
from outbox.v1.batch_service_pb2 import (
    GetBatchRequest,
    ListBatchesRequest,
    ListRejectionsRequest,
    ScheduleBatchResponse,
    UploadBatchRequest,
    WatchBatchRequest,
)
from outbox.v1.email_job_event_service_pb2 import WatchEmailJobsRequest, WatchEmailJobsResponse
from outbox.v1.email_job_pb2 import Attempt, EmailJob
from outbox.v1.email_job_service_pb2 import (
    ExportedEmailJob,
    ExportEmailJobsRequest,
    ListAttemptsRequest,
    ListEmailJobsRequest,
)
from outbox.v1.sender_pb2 import Sender
from outbox.v1.sender_service_pb2 import ListSendersRequest
from outbox.v1.suppression_pb2 import Suppression
from outbox.v1.suppression_service_pb2 import ExportSuppressionsRequest, ListSuppressionsRequest
from outbox.v1.user_pb2 import User
from outbox.v1.user_service_pb2 import ListUsersRequest
from outbox.v1.webhook_pb2 import Webhook, WebhookDelivery
from outbox.v1.webhook_service_pb2 import ListWebhookDeliveriesRequest, ListWebhooksRequest

from outbox_client import aio as io
from outbox_client._async.channel import with_request_id
from outbox_client._async.services import AsyncServices
from outbox_client.errors import CallError, Unimplemented, deadline_exceeded
from outbox_client.retries import NO_RETRIES, Attempts, RetryPolicy
from outbox_client.sources import Chunks, ProgressCallback, Rows, Source, UploadProgress, source_of

_PAGE: Final = 1000
# How long a watch tries to reach a server again. A restart of the scheduler takes much less.
_PATIENCE_S: Final = 60.0
_PATIENT: Final = RetryPolicy(tries=1000)
_LOOK: Final = RetryPolicy(first=timedelta(milliseconds=200), factor=1.3)


class AsyncClient(AsyncServices):
    """A client of one Outbox installation. Use it as a context manager, or call `close`.

    `senders`, `batches`, `email_jobs`, `email_job_events`, `suppressions`, `users`, `holds`,
    `audit`, `api_keys`, `webhooks`, `stats`, `dispatcher` and `server` are the generated stubs with
    all methods of the API, such as `client.senders.CreateSender(request)`. A call takes `timeout`
    (in seconds, for all tries together; default: the client's `timeout`) and `metadata`, and raises
    CallError. Reads, `ScheduleBatch`, `upload` and calls with a `request_id` are retried while the
    server is unreachable; other calls only if the server says that it has changed nothing.
    """

    async def upload(
        self,
        rows: Rows,
        options: BatchOptions,
        *,
        progress: ProgressCallback | None = None,
        timeout: float | None = None,
        validate_only: bool = False,
        identity: str = "",
        reason: str = "",
    ) -> ScheduleBatchResponse:
        """Schedule a batch of any size, streamed, so that memory does not grow with its size.

        If `options` has no `request_id`, a new one is used. While the server is unreachable, the
        upload is retried with the same id if `rows` can be read again: a path, bytes, a seekable
        file, a list, a table. An iterator or a pipe is sent once; the error has the `request_id`.

        Args:
            rows: a path, bytes or a binary file; an iterable of bytes; an iterable of rows, which
                are mappings with the same columns, one of them `email`; or a table with `to_csv`
                (pandas) or `write_csv` (polars).
            options: the options of the batch.
            progress: called after each chunk (64 KiB) that was passed on.
            timeout: in seconds, for all tries together. None means the client's `upload_timeout`.
            validate_only: only check the batch, and get the answer that the upload would get. Only
                a server with the capability `change.validate_only` does that: others store it.
            identity: who asks for the batch, for the audit log.
            reason: why, for the audit log.

        Raises:
            CallError: the server refused the batch or did not answer.
            TypeError, ValueError: `rows` is none of these, or mixes kinds.
            OSError: the file cannot be read.
        """
        first = with_request_id(
            UploadBatchRequest(
                options=options, validate_only=validate_only, identity=identity, reason=reason
            )
        )
        source = source_of(rows)
        limit = self._connection.upload_timeout if timeout is None else timeout
        # Rows that can be read only once cannot be sent again, even if the server permits a retry.
        retry = self._connection.retry if source.repeatable else NO_RETRIES
        attempts = Attempts(retry, limit, safe=True)
        try:
            while True:
                try:
                    messages = _messages(first, source, progress)
                    return await self.batches.UploadBatch(messages, timeout=attempts.remaining())
                except CallError as error:
                    pause = attempts.pause_after(error)
                await io.sleep(pause)
        except CallError as error:
            error.request_id = first.options.request_id
            raise

    async def watch_batch(
        self,
        batch_id: str,
        user_id: str = "",
        *,
        timeout: float | None = None,
        trouble: Callable[[CallError], None] | None = None,
    ) -> AsyncIterator[Batch]:
        """Yield a batch at once, then after each change, until every job is in a final state.

        If the server is unreachable, the client tries again for a minute and calls `trouble` at
        each failure. A server without WatchBatch is polled with GetBatch, with pauses up to 5 s.

        Raises:
            CallError: the server refused, was unreachable for a minute, or `timeout` has passed.
        """
        end = None if timeout is None else time.monotonic() + timeout
        token = ""
        patience = Attempts(_PATIENT, _PATIENCE_S, safe=True)
        while True:
            request = WatchBatchRequest(batch_id=batch_id, user_id=user_id, resume_token=token)
            pause = _LOOK.first.total_seconds()
            try:
                stream = self.batches.WatchBatch(request, timeout=_left(end))
                async with aclosing(stream):  # type: ignore[type-var]  # it is a generator
                    async for update in stream:
                        token = update.resume_token
                        patience = Attempts(_PATIENT, _PATIENCE_S, safe=True)
                        yield update.batch
                        if update.done:
                            return
            except Unimplemented:
                break
            except CallError as error:
                pause = patience.pause_after(error)
                if trouble is not None:
                    trouble(error)
            await io.sleep(pause)
        async for batch in self._poll(batch_id, user_id, end, trouble):
            yield batch

    async def watch_email_jobs(
        self,
        request: WatchEmailJobsRequest,
        *,
        trouble: Callable[[CallError], None] | None = None,
    ) -> AsyncIterator[WatchEmailJobsResponse]:
        """Yield the messages of WatchEmailJobs, some of which have only a new `resume_token`.

        A broken stream is resumed after the last message that was yielded. If the server is
        unreachable, the client tries again for a minute and calls `trouble` at each failure. To go
        on after a crash, store the `resume_token` of each message with what you made of it.

        Raises:
            CallError: the server refused, or was unreachable for a minute.
        """
        asked = WatchEmailJobsRequest()
        asked.CopyFrom(request)
        patience = Attempts(_PATIENT, _PATIENCE_S, safe=True)
        while True:
            pause = _LOOK.first.total_seconds()
            try:
                stream = self.email_job_events.WatchEmailJobs(asked, timeout=None)
                async with aclosing(stream):  # type: ignore[type-var]  # it is a generator
                    async for message in stream:
                        asked.resume_token = message.resume_token
                        patience = Attempts(_PATIENT, _PATIENCE_S, safe=True)
                        yield message
            except CallError as error:
                pause = patience.pause_after(error)
                if trouble is not None:
                    trouble(error)
            await io.sleep(pause)

    async def wait_for_batch(
        self, batch_id: str, user_id: str = "", *, timeout: float | None = None
    ) -> Batch:
        """Return a batch when all its jobs are in a final state.

        Raises:
            CallError: see `watch_batch`.
        """
        batch = Batch()
        async for now in self.watch_batch(batch_id, user_id, timeout=timeout):
            batch = now
        return batch

    def list_senders(self, request: ListSendersRequest) -> AsyncIterator[Sender]:
        """Yield the senders from all pages of ListSenders."""
        return self._items(self.senders.ListSenders, request, "senders")

    def list_batches(self, request: ListBatchesRequest) -> AsyncIterator[Batch]:
        """Yield the batches from all pages of ListBatches."""
        return self._items(self.batches.ListBatches, request, "batches")

    def list_rejections(self, request: ListRejectionsRequest) -> AsyncIterator[Rejection]:
        """Yield the rejections from all pages of ListRejections."""
        return self._items(self.batches.ListRejections, request, "rejections")

    def list_email_jobs(self, request: ListEmailJobsRequest) -> AsyncIterator[EmailJob]:
        """Yield the jobs from all pages of ListEmailJobs."""
        return self._items(self.email_jobs.ListEmailJobs, request, "email_jobs")

    def list_attempts(self, request: ListAttemptsRequest) -> AsyncIterator[Attempt]:
        """Yield the attempts from all pages of ListAttempts."""
        return self._items(self.email_jobs.ListAttempts, request, "attempts")

    def list_users(self, request: ListUsersRequest) -> AsyncIterator[User]:
        """Yield the users from all pages of ListUsers."""
        return self._items(self.users.ListUsers, request, "users")

    def list_api_keys(self, request: ListApiKeysRequest) -> AsyncIterator[ApiKey]:
        """Yield the keys from all pages of ListApiKeys."""
        return self._items(self.api_keys.ListApiKeys, request, "api_keys")

    def list_audit_events(self, request: ListAuditEventsRequest) -> AsyncIterator[AuditEvent]:
        """Yield the changes from all pages of ListAuditEvents."""
        return self._items(self.audit.ListAuditEvents, request, "audit_events")

    def list_suppressions(self, request: ListSuppressionsRequest) -> AsyncIterator[Suppression]:
        """Yield the suppressions from all pages of ListSuppressions."""
        return self._items(self.suppressions.ListSuppressions, request, "suppressions")

    def list_webhooks(self, request: ListWebhooksRequest) -> AsyncIterator[Webhook]:
        """Yield the webhooks from all pages of ListWebhooks."""
        return self._items(self.webhooks.ListWebhooks, request, "webhooks")

    def list_webhook_deliveries(
        self, request: ListWebhookDeliveriesRequest
    ) -> AsyncIterator[WebhookDelivery]:
        """Yield the failed deliveries from all pages of ListWebhookDeliveries."""
        return self._items(self.webhooks.ListWebhookDeliveries, request, "webhook_deliveries")

    def export_email_jobs(
        self, request: ExportEmailJobsRequest, *, timeout: float | None = None
    ) -> AsyncIterator[ExportedEmailJob]:
        """Yield the jobs of ExportEmailJobs, each once, and continue after interruptions.

        If the server is unreachable, the client tries again for a minute.
        """
        return self._resumed(
            self.email_jobs.ExportEmailJobs, request, "exported_email_jobs", timeout
        )

    def export_suppressions(
        self, request: ExportSuppressionsRequest, *, timeout: float | None = None
    ) -> AsyncIterator[Suppression]:
        """Yield the suppressions of ExportSuppressions, and continue after interruptions.

        If the server is unreachable, the client tries again for a minute.
        """
        return self._resumed(self.suppressions.ExportSuppressions, request, "suppressions", timeout)

    async def _items(self, method: Any, request: Any, field: str) -> AsyncIterator[Any]:
        page_request = type(request)()
        page_request.CopyFrom(request)
        page_request.page_size = request.page_size or _PAGE
        while True:
            page = await method(page_request)
            for item in getattr(page, field):
                yield item
            page_request.page_token = page.next_page_token
            if not page.next_page_token:
                return

    async def _resumed(
        self, method: Any, request: Any, field: str, timeout: float | None
    ) -> AsyncIterator[Any]:
        """Yield the items of a stream that ends by itself, and resume it after interruptions."""
        end = None if timeout is None else time.monotonic() + timeout
        resumed = type(request)()
        resumed.CopyFrom(request)
        patience = Attempts(_PATIENT, _PATIENCE_S, safe=True)
        while True:
            try:
                stream = method(resumed, timeout=_left(end))
                async with aclosing(stream):
                    async for message in stream:
                        patience = Attempts(_PATIENT, _PATIENCE_S, safe=True)
                        for item in getattr(message, field):
                            yield item
                        resumed.resume_token = message.resume_token
                        if not message.resume_token:
                            return
            except CallError as error:
                await io.sleep(patience.pause_after(error))
            else:
                return

    async def _poll(
        self,
        batch_id: str,
        user_id: str,
        end: float | None,
        trouble: Callable[[CallError], None] | None,
    ) -> AsyncIterator[Batch]:
        request = GetBatchRequest(batch_id=batch_id, user_id=user_id)
        seen = Batch()
        pause = first = _LOOK.first.total_seconds()
        patience = Attempts(_PATIENT, _PATIENCE_S, safe=True)
        while True:
            try:
                batch = await self.batches.GetBatch(request, timeout=_left(end))
                patience = Attempts(_PATIENT, _PATIENCE_S, safe=True)
                changed = batch != seen
                pause = first if changed else pause * _LOOK.factor
                if changed:
                    seen = batch
                    yield batch
                if not is_open(batch):
                    return
            except CallError as error:
                pause = patience.pause_after(error)
                if trouble is not None:
                    trouble(error)
            pause = min(pause, _LOOK.longest.total_seconds())
            if end is not None and time.monotonic() + pause >= end:
                raise deadline_exceeded(f"batch {batch_id} did not finish in time")
            await io.sleep(pause)


def is_open(batch: Batch) -> bool:
    """Return whether a job of the batch waits or is being sent."""
    counts = batch.counts
    return bool(
        batch.state == BatchState.BATCH_STATE_ACTIVE
        or counts.scheduled_count
        or counts.sending_count
    )


async def _messages(
    first: UploadBatchRequest, source: Source, progress: ProgressCallback | None
) -> AsyncIterator[UploadBatchRequest]:
    yield first
    chunks, sent = Chunks(), 0
    async with io.opened(source) as stream:
        async for item in io.each(stream):
            for chunk in chunks.take(item):
                yield UploadBatchRequest(chunk=chunk)
                sent += len(chunk)
                if progress is not None:
                    progress(UploadProgress(sent, source.size, chunks.rows))
    for chunk in chunks.rest():
        yield UploadBatchRequest(chunk=chunk)
        sent += len(chunk)
    if progress is not None:
        progress(UploadProgress(sent, source.size, chunks.rows))


def _left(end: float | None) -> float | None:
    return None if end is None else max(end - time.monotonic(), 0.001)
