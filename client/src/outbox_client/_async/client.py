"""The client: the stubs of all services, and what a caller would otherwise write around them."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, cast

import grpc
from outbox.v1.batch_pb2 import Batch, BatchOptions, BatchState, Rejection
from outbox.v1.batch_service_pb2 import (
    GetBatchRequest,
    ListBatchesRequest,
    ListRejectionsRequest,
    ScheduleBatchResponse,
    UploadBatchRequest,
    WatchBatchRequest,
)
from outbox.v1.batch_service_pb2_grpc import BatchServiceStub
from outbox.v1.dispatcher_service_pb2_grpc import DispatcherServiceStub
from outbox.v1.email_job_pb2 import Attempt, EmailJob
from outbox.v1.email_job_service_pb2 import ListAttemptsRequest, ListEmailJobsRequest
from outbox.v1.email_job_service_pb2_grpc import EmailJobServiceStub
from outbox.v1.sender_pb2 import Sender
from outbox.v1.sender_service_pb2 import ListSendersRequest
from outbox.v1.sender_service_pb2_grpc import SenderServiceStub
from outbox.v1.stats_service_pb2_grpc import StatsServiceStub
from outbox.v1.suppression_pb2 import Suppression
from outbox.v1.suppression_service_pb2 import ListSuppressionsRequest
from outbox.v1.suppression_service_pb2_grpc import SuppressionServiceStub

from outbox_client import aio as io
from outbox_client._async.channel import Channel, with_request_id
from outbox_client.errors import CallError, Unimplemented, deadline_exceeded
from outbox_client.retries import NO_RETRIES, Attempts, RetryPolicy
from outbox_client.settings import Connection, Tls
from outbox_client.sources import Chunks, ProgressCallback, Rows, Source, UploadProgress, source_of

if TYPE_CHECKING:  # names that only the type stubs know
    from outbox.v1.batch_service_pb2_grpc import BatchServiceAsyncStub
    from outbox.v1.dispatcher_service_pb2_grpc import DispatcherServiceAsyncStub
    from outbox.v1.email_job_service_pb2_grpc import EmailJobServiceAsyncStub
    from outbox.v1.sender_service_pb2_grpc import SenderServiceAsyncStub
    from outbox.v1.stats_service_pb2_grpc import StatsServiceAsyncStub
    from outbox.v1.suppression_service_pb2_grpc import SuppressionServiceAsyncStub

_PAGE: Final = 1000
# A batch is followed for as long as it takes: a scheduler that is started again is back long
# before this is over.
_PATIENCE_S: Final = 60.0
_PATIENT: Final = RetryPolicy(tries=1000)
_LOOK: Final = RetryPolicy(first=timedelta(milliseconds=200), factor=1.3)


class AsyncClient:
    """A client of one Outbox. Open until `close`, or as a context manager.

    `senders`, `batches`, `email_jobs`, `suppressions`, `stats` and `dispatcher` are the generated
    stubs with all methods of the contract, such as `client.senders.CreateSender(request)`. A call
    takes `timeout` (seconds, all tries together; `timeout` of the client by default) and
    `metadata`, and raises CallError. Reads, `ScheduleBatch` and `upload` are repeated while the
    server is away; nothing else is, unless the server says that it has changed nothing.
    """

    def __init__(
        self,
        scheduler: str | None = None,
        *,
        stats: str | None = None,
        dispatcher: str | None = None,
        api_key: str | None = None,
        tls: Tls | None = None,
        timeout: float = 30.0,
        upload_timeout: float = 3600.0,
        retry: RetryPolicy | None = None,
        options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        """Connect to nothing yet: a channel is opened when its service is first used.

        Args:
            scheduler: host:port of the scheduler, or of a proxy in front of it. A client without
                any address asks the default ports of this machine.
            stats: of the stats service.
            dispatcher: of a dispatcher.
            api_key: goes with every call; over TLS, unless you trust the way.
            tls: None: plain text.
            timeout: of a call, in seconds, all its tries together.
            upload_timeout: of an upload.
            retry: None: 7 tries within 6.3 s.
            options: gRPC's channel options; they win over ours.

        Raises:
            OSError, ValueError: the files of `tls` cannot be used.
        """
        if scheduler is None and stats is None and dispatcher is None:
            scheduler, dispatcher, stats = (f"127.0.0.1:{port}" for port in (50051, 50052, 50053))
        self._addresses = {"scheduler": scheduler, "stats": stats, "dispatcher": dispatcher}
        self._connection = Connection(
            api_key=api_key,
            credentials=None if tls is None else tls.credentials(),
            timeout=timeout,
            upload_timeout=upload_timeout,
            retry=retry or RetryPolicy(),
            options=options,
        )
        self._channels: dict[str, Channel] = {}
        self._stubs: dict[Any, Any] = {}

    @property
    def senders(self) -> SenderServiceAsyncStub:
        """SenderService."""
        return cast("SenderServiceAsyncStub", self._stub("scheduler", SenderServiceStub))

    @property
    def batches(self) -> BatchServiceAsyncStub:
        """BatchService; of UploadBatch see `upload`."""
        return cast("BatchServiceAsyncStub", self._stub("scheduler", BatchServiceStub))

    @property
    def email_jobs(self) -> EmailJobServiceAsyncStub:
        """EmailJobService."""
        return cast("EmailJobServiceAsyncStub", self._stub("scheduler", EmailJobServiceStub))

    @property
    def suppressions(self) -> SuppressionServiceAsyncStub:
        """SuppressionService."""
        return cast("SuppressionServiceAsyncStub", self._stub("scheduler", SuppressionServiceStub))

    @property
    def stats(self) -> StatsServiceAsyncStub:
        """StatsService."""
        return cast("StatsServiceAsyncStub", self._stub("stats", StatsServiceStub))

    @property
    def dispatcher(self) -> DispatcherServiceAsyncStub:
        """DispatcherService, of one dispatcher."""
        return cast("DispatcherServiceAsyncStub", self._stub("dispatcher", DispatcherServiceStub))

    async def upload(
        self,
        rows: Rows,
        options: BatchOptions,
        *,
        progress: ProgressCallback | None = None,
        timeout: float | None = None,
    ) -> ScheduleBatchResponse:
        """Schedule a batch of any size, streamed: memory does not grow with it.

        Without a `request_id` it gets one. While the server is away the upload is repeated with
        it, if `rows` can be read again: a path, bytes, a file that can seek, a list, a table. What
        can be read once, an iterator or a pipe, is sent once; the error has the `request_id`.

        Args:
            rows: a path, bytes, a binary file; an iterable of bytes; an iterable of rows, mappings
                with the same columns, one of them `email`; a table with `to_csv` (pandas) or
                `write_csv` (polars).
            options: what is decided about the batch.
            progress: is called after every chunk, 64 KiB, that was handed over.
            timeout: in seconds, all tries together; None: the client's `upload_timeout`.

        Raises:
            CallError: the server refused, or did not answer.
            TypeError, ValueError: `rows` are none of these, or not all of one kind.
            OSError: the file cannot be read.
        """
        first = with_request_id(UploadBatchRequest(options=options))
        source = source_of(rows)
        limit = self._connection.upload_timeout if timeout is None else timeout
        # Whatever the server says, what was read once is gone.
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
        """Yield a batch as it is, then after each change, until every job is in a final state.

        A server that is away is asked again for a minute; `trouble` is told each time. One without
        WatchBatch is asked with GetBatch, with pauses that grow to 5 s.

        Raises:
            CallError: the server refused, was away for a minute, or `timeout` seconds are over.
        """
        end = None if timeout is None else time.monotonic() + timeout
        token = ""
        patience = Attempts(_PATIENT, _PATIENCE_S, safe=True)
        while True:
            request = WatchBatchRequest(batch_id=batch_id, user_id=user_id, resume_token=token)
            pause = _LOOK.first.total_seconds()
            try:
                stream = self.batches.WatchBatch(request, timeout=_left(end))
                async with aclosing(stream):  # type: ignore[type-var]  # ours is a generator
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
        async for batch in self._look_at(batch_id, user_id, end, trouble):
            yield batch

    async def wait_for_batch(
        self, batch_id: str, user_id: str = "", *, timeout: float | None = None
    ) -> Batch:
        """Return a batch when every job of it is in a final state.

        Raises:
            CallError: as `watch_batch`.
        """
        batch = Batch()
        async for now in self.watch_batch(batch_id, user_id, timeout=timeout):
            batch = now
        return batch

    def list_senders(self, request: ListSendersRequest) -> AsyncIterator[Sender]:
        """Yield what ListSenders lists, from all its pages."""
        return self._items(self.senders.ListSenders, request, "senders")

    def list_batches(self, request: ListBatchesRequest) -> AsyncIterator[Batch]:
        """Yield what ListBatches lists, from all its pages."""
        return self._items(self.batches.ListBatches, request, "batches")

    def list_rejections(self, request: ListRejectionsRequest) -> AsyncIterator[Rejection]:
        """Yield what ListRejections lists, from all its pages."""
        return self._items(self.batches.ListRejections, request, "rejections")

    def list_email_jobs(self, request: ListEmailJobsRequest) -> AsyncIterator[EmailJob]:
        """Yield what ListEmailJobs lists, from all its pages."""
        return self._items(self.email_jobs.ListEmailJobs, request, "email_jobs")

    def list_attempts(self, request: ListAttemptsRequest) -> AsyncIterator[Attempt]:
        """Yield what ListAttempts lists, from all its pages."""
        return self._items(self.email_jobs.ListAttempts, request, "attempts")

    def list_suppressions(self, request: ListSuppressionsRequest) -> AsyncIterator[Suppression]:
        """Yield what ListSuppressions lists, from all its pages."""
        return self._items(self.suppressions.ListSuppressions, request, "suppressions")

    async def close(self) -> None:
        """Close the channels; calls under way are cancelled."""
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()
        self._stubs.clear()

    async def __aenter__(self) -> Self:
        """Return the client."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        await self.close()

    def _stub(self, service: str, stub: Any) -> Any:
        """Return a stub, made when it is first wanted, over the one channel of its address."""
        if stub not in self._stubs:
            address = self._addresses[service]
            if address is None:
                raise ValueError(f"no address: Client(..., {service}='host:port')")
            if address not in self._channels:
                self._channels[address] = Channel(address, self._connection)
            self._stubs[stub] = stub(cast("grpc.aio.Channel", self._channels[address]))
        return self._stubs[stub]

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

    async def _look_at(
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
                raise deadline_exceeded(f"batch {batch_id} has not ended in time")
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
