"""Implements BatchService."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import astuple
from datetime import timedelta
from functools import partial
from typing import Final, TypeAlias

from outbox.v1 import batch_pb2, batch_service_pb2, batch_service_pb2_grpc
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from structlog.contextvars import bind_contextvars

from outbox_server.services.scheduler.changes import Changes, Made, check_etag
from outbox_server.services.scheduler.filters.fields import (
    FieldTest,
    both,
    required_value,
)
from outbox_server.services.scheduler.filters.resources import (
    BATCH_FIELDS,
    BATCH_ORDERS,
    REJECTION_FIELDS,
    REJECTION_ORDERS,
)
from outbox_server.services.scheduler.forecasts import BatchForecast, Forecaster
from outbox_server.services.scheduler.intake import Acceptance, Intake, recipient_suppressed
from outbox_server.services.scheduler.previewing import Previewer
from outbox_server.services.scheduler.servicers.batch_control import BatchControl
from outbox_server.services.scheduler.servicers.batch_mapping import (
    LONG_OR_PERSONAL,
    batch_etag,
    to_batch,
)
from outbox_server.services.scheduler.servicers.calls import (
    Context,
    acting_user,
    check_file_type,
    checked_list,
    checked_options,
    errors_name,
    listed_user,
)
from outbox_server.services.scheduler.servicers.job_mapping import to_job
from outbox_server.services.scheduler.servicers.preview_mapping import to_preview
from outbox_server.services.scheduler.servicers.sample_mail import (
    naming_recipient,
    options_of_test,
)
from outbox_server.services.scheduler.small_batches import MOST_SMALL_BYTES, MOST_SMALL_ROWS
from outbox_server.services.scheduler.storage import batches as storage
from outbox_server.services.scheduler.storage.cancelling import cancel_batch
from outbox_server.services.scheduler.storage.email_jobs import find_only_job
from outbox_server.services.scheduler.sweeping import Sweeper
from outbox_server.shared import bounds
from outbox_server.shared.database.audit_events import RecordedChange
from outbox_server.shared.database.engine import snapshot
from outbox_server.shared.errors import InvalidInput, Unavailable, Violations
from outbox_server.shared.heads.loader import HeadLoader, load_soon
from outbox_server.shared.intake.batch_options import BatchOptions
from outbox_server.shared.intake.option_mapping import to_rejections
from outbox_server.shared.intake.payloads import (
    CsvPayload,
    Payload,
    RowsPayload,
    StreamedChunks,
    WholeFile,
)
from outbox_server.shared.intake.rows import RawRow, RowRejection
from outbox_server.shared.intake.upload_rate import LeastRate
from outbox_server.shared.rpc import page_tokens
from outbox_server.shared.rpc.paging import requested_page
from outbox_server.shared.rpc.proto_mapping import not_found, parse_id, to_timestamp
from outbox_server.shared.rpc.requested_changes import check_origin, requested_change
from outbox_server.shared.rpc.watching import Watch
from outbox_server.shared.states import BatchState

_WATCHED: Final = "watched batch"
# The rows of a cancelled batch with at most this many jobs are updated before the call returns.
_SWEPT_IN_CALL: Final = 5_000
_NewBatch: TypeAlias = (
    batch_service_pb2.ScheduleBatchRequest
    | batch_service_pb2.UploadBatchRequest
    | batch_service_pb2.UploadBatchFileRequest
)
# Loading a head takes 0.4 s after a million cancelled rows. The caller waits no longer than this.
_LOAD_LIMIT: Final = timedelta(seconds=1)


class BatchServicer(batch_service_pb2_grpc.BatchServiceServicer):
    """Accepts, reads, watches and cancels batches."""

    def __init__(
        self,
        engine: AsyncEngine,
        loader: HeadLoader,
        intake: Intake,
        forecaster: Forecaster,
        *,
        sweeper: Sweeper,
        watch: Watch[storage.BatchRecord],
        least_rate: LeastRate,
        changes: Changes,
        previewer: Previewer,
        control: BatchControl,
    ) -> None:
        self._control = control
        self._changes = changes
        self._previewer = previewer
        self._watch = watch
        self._least_rate = least_rate
        self._engine = engine
        self._sweeper = sweeper
        self._loader = loader
        self._intake = intake
        self._forecaster = forecaster

    async def ScheduleBatch(
        self,
        request: batch_service_pb2.ScheduleBatchRequest,
        context: Context,
    ) -> batch_service_pb2.ScheduleBatchResponse:
        """Accept a batch from one message."""
        user_id, options, change = _asked(request)
        bind_contextvars(request_id=options.request_id)
        payload = partial(_payload, request)
        accept = self._intake.accept_small if _is_small(request) else self._accept_whole
        if request.validate_only:
            accept = self._check_whole
        with errors_name(request.WhichOneof("payload") or "payload"):
            accepted = await accept(options, payload, user_id, change)
        return await self._answer(accepted, forecast=request.require_forecast)

    async def _accept_whole(
        self,
        options: BatchOptions,
        payload: Callable[[], Payload],
        user_id: str | None,
        change: RecordedChange,
    ) -> Acceptance:
        return await self._intake.accept(options, payload(), user_id, change)

    async def _check_whole(
        self,
        options: BatchOptions,
        payload: Callable[[], Payload],
        user_id: str | None,
        change: RecordedChange,
    ) -> Acceptance:
        return await self._intake.accept(options, payload(), user_id, change, validate_only=True)

    async def UploadBatch(
        self,
        request_iterator: AsyncIterator[batch_service_pb2.UploadBatchRequest],
        context: Context,
    ) -> batch_service_pb2.ScheduleBatchResponse:
        """Accept a batch from a CSV in chunks."""
        messages = self._least_rate.keep(aiter(request_iterator))
        first = await anext(messages, None)
        if first is None or first.WhichOneof("part") != "options":
            raise _out_of_order("options", "must be set in the first message")
        user_id, options, change = _asked(first)
        bind_contextvars(request_id=options.request_id)
        payload = CsvPayload(StreamedChunks(_chunks(messages)))
        with errors_name("chunk"):
            accepted = await self._intake.accept(
                options, payload, user_id, change, validate_only=first.validate_only
            )
        return await self._answer(accepted)

    async def UploadBatchFile(
        self,
        request_iterator: AsyncIterator[batch_service_pb2.UploadBatchFileRequest],
        context: Context,
    ) -> batch_service_pb2.ScheduleBatchResponse:
        """Accept a batch from a CSV that is the body of an HTTP request."""
        messages = self._least_rate.keep(aiter(request_iterator))
        first = await anext(messages, None)
        if first is None:
            raise _out_of_order("options", "must be set in the first message")
        user_id, options, change = _asked(first)
        bind_contextvars(request_id=options.request_id)
        check_file_type(first.file.content_type)
        payload = CsvPayload(StreamedChunks(_pieces(first, messages)))
        with errors_name("file"):
            accepted = await self._intake.accept(
                options, payload, user_id, change, validate_only=first.validate_only
            )
        return await self._answer(accepted)

    async def PreviewBatch(
        self,
        request: batch_service_pb2.PreviewBatchRequest,
        context: Context,
    ) -> batch_service_pb2.PreviewBatchResponse:
        """Return the mails of some rows of a batch that is not stored."""
        wrong = Violations()
        for index, number in enumerate(request.row_numbers):
            with wrong:
                if number < 1:
                    raise InvalidInput.field(
                        f"row_numbers[{index}]",
                        f"must be at least 1 (got {number})",
                        reason="ROW_NUMBER_INVALID",
                    )
        user_id, options = checked_options(request.options, validate_only=True, found=wrong)
        with errors_name(request.WhichOneof("payload") or "payload"):
            found = await self._previewer.preview(
                options, _payload(request), request.row_numbers, user_id
            )
        return to_preview(found)

    async def SendTestEmail(
        self,
        request: batch_service_pb2.SendTestEmailRequest,
        context: Context,
    ) -> batch_service_pb2.SendTestEmailResponse:
        """Accept one mail as a test."""
        wrong = Violations()
        with wrong:
            check_origin(request)
        user_id, options = options_of_test(request.options, wrong)
        change = requested_change(request)
        bind_contextvars(request_id=options.request_id)
        row = request.recipient
        payload = RowsPayload([_raw_row(row)], 1)
        with naming_recipient():
            accepted = await self._intake.accept(options, payload, user_id, change)
        bind_contextvars(batch_id=accepted.batch_id)
        async with self._engine.connect() as connection:
            job = await find_only_job(connection, accepted.batch_id, accepted.user_id)
            batch = await storage.read_batch(connection, accepted.batch_id, accepted.user_id)
            if job is None or batch is None:
                # It was suppressed while it was accepted, or removed since.
                raise recipient_suppressed()
            forecast = await self._forecaster.forecast(connection, batch)
            installation = await self._previewer.installation_id()
        return batch_service_pb2.SendTestEmailResponse(
            email_job=to_job(job, installation),
            replayed=accepted.replayed,
            estimated_send_time=None if forecast.end is None else to_timestamp(forecast.end),
            notices=[*forecast.notices, *accepted.notices],
        )

    async def GetBatch(
        self,
        request: batch_service_pb2.GetBatchRequest,
        context: Context,
    ) -> batch_pb2.Batch:
        """Return one batch."""
        user_id = acting_user(request.user_id)
        batch_id = parse_id(request.batch_id, "batch_id")
        return await self._read(batch_id, user_id)

    async def ListBatches(
        self,
        request: batch_service_pb2.ListBatchesRequest,
        context: Context,
    ) -> batch_service_pb2.ListBatchesResponse:
        """Return one page of batches."""
        wrong = Violations()
        tree, descending = checked_list(request, BATCH_FIELDS, BATCH_ORDERS, wrong)
        wrong.raise_any()
        if request.sender_id:
            sender_id = parse_id(request.sender_id, "sender_id")
            tree = both(tree, FieldTest("sender_id", "=", sender_id))
        user_id = listed_user(request.user_id, narrowed=required_value(tree, "sender_id")[0])
        page = requested_page(
            request,
            "batches",
            user_id,
            *(request.sender_id, request.filter, request.order_by),
            start=(page_tokens.MAX_ID if descending else 0,),
        )
        async with self._engine.connect() as connection:
            found, reached = await storage.list_batches(
                connection, user_id, tree, *page.after, page.limit, descending=descending
            )
        shown, token = page.cut(
            found, lambda batch: (batch.batch_id,), None if reached is None else (reached,)
        )
        return batch_service_pb2.ListBatchesResponse(
            batches=[to_batch(batch) for batch in shown], next_page_token=token
        )

    async def ListRejections(
        self,
        request: batch_service_pb2.ListRejectionsRequest,
        context: Context,
    ) -> batch_service_pb2.ListRejectionsResponse:
        """Return one page of a batch's rejections."""
        wrong = Violations()
        user_id = wrong.value(lambda: acting_user(request.user_id), None)
        batch_id = wrong.value(lambda: parse_id(request.batch_id, "batch_id"), 0)
        tree, descending = checked_list(request, REJECTION_FIELDS, REJECTION_ORDERS, wrong)
        wrong.raise_any()
        filters = (user_id, batch_id, request.filter, request.order_by)
        page = requested_page(
            request, "rejections", *filters, start=(page_tokens.MAX_ID if descending else 0,)
        )
        async with self._engine.connect() as connection:
            if not await storage.batch_exists(connection, batch_id, user_id):
                raise not_found("batch_id", request.batch_id)
            found, reached = await storage.list_rejections(
                connection, batch_id, *page.after, page.limit, tree, descending=descending
            )
        shown, token = page.cut(
            found,
            lambda rejection: (rejection.row_number,),
            None if reached is None else (reached,),
        )
        return batch_service_pb2.ListRejectionsResponse(
            rejections=to_rejections(shown), next_page_token=token
        )

    async def CancelBatch(
        self,
        request: batch_service_pb2.CancelBatchRequest,
        context: Context,
    ) -> batch_service_pb2.CancelBatchResponse:
        """Cancel the waiting jobs of a batch."""
        user_id = acting_user(request.user_id)
        batch_id = parse_id(request.batch_id, "batch_id")

        async def cancel(
            connection: AsyncConnection,
        ) -> Made[batch_service_pb2.CancelBatchResponse]:
            cancelled = await cancel_batch(connection, batch_id, user_id)
            found = await storage.read_batch(connection, batch_id, user_id)
            if cancelled is None or found is None:
                raise not_found("batch_id", request.batch_id)
            check_etag(request.etag, batch_etag(cancelled.was, found.revision), "this batch")
            batch = to_batch(found)
            # Texts are left out as in lists, because the answer is stored, and they may be long or
            # be erased.
            for text in LONG_OR_PERSONAL:
                batch.ClearField(text)
            counts = batch.counts

            async def afterwards() -> None:
                if not cancelled.jobs:
                    return
                await load_soon(self._loader, [cancelled.sender_id], limit=_LOAD_LIMIT)
                if cancelled.jobs <= _SWEPT_IN_CALL:
                    await self._sweeper.sweep(batch_id)
                self._sweeper.wake()

            answer = batch_service_pb2.CancelBatchResponse(
                batch=batch,
                cancelled_count=cancelled.jobs,
                too_late_count=found.accepted_count
                - (counts.cancelled_count + counts.suppressed_count + counts.expired_count),
            )
            return Made(
                answer,
                f"batches/{batch_id}",
                found.user_id,
                before={"state": cancelled.was.name},
                after={"state": found.state.name, "cancelled_count": cancelled.jobs},
                changed=cancelled.was is not BatchState.CANCELLED,
                afterwards=afterwards,
            )

        return await self._changes.make(
            request, user_id, batch_service_pb2.CancelBatchResponse, cancel
        )

    async def PauseBatch(
        self,
        request: batch_service_pb2.PauseBatchRequest,
        context: Context,
    ) -> batch_pb2.Batch:
        """Pause a batch."""
        return await self._control.pause(request)

    async def ResumeBatch(
        self,
        request: batch_service_pb2.ResumeBatchRequest,
        context: Context,
    ) -> batch_pb2.Batch:
        """End the pause of a batch."""
        return await self._control.resume(request)

    async def UpdateBatch(
        self,
        request: batch_service_pb2.UpdateBatchRequest,
        context: Context,
    ) -> batch_pb2.Batch:
        """Change the unsent mail of a batch."""
        return await self._control.update(request)

    async def WatchBatch(
        self,
        request: batch_service_pb2.WatchBatchRequest,
        context: Context,
    ) -> AsyncIterator[batch_service_pb2.WatchBatchResponse]:
        """Stream a batch as it changes, until every job is in a final state."""
        user_id = acting_user(request.user_id)
        batch_id = parse_id(request.batch_id, "batch_id")
        stream = page_tokens.digest_filters(batch_id)
        seen = page_tokens.decode_resume(request.resume_token, _WATCHED, stream)
        async with self._engine.connect() as connection:
            if not await storage.batch_exists(connection, batch_id, user_id):
                raise not_found("batch_id", request.batch_id)
        async with aclosing(self._watch.follow(batch_id)) as changes:
            async for found in changes:
                state = (page_tokens.digest_filters(*astuple(found)).hex(),)
                done = not found.counts.open
                if state != seen or done:
                    yield batch_service_pb2.WatchBatchResponse(
                        batch=to_batch(found),
                        resume_token=page_tokens.encode(_WATCHED, stream, state),
                        done=done,
                    )
                if done:
                    return
                seen = None

    async def _read(self, batch_id: int, user_id: str | None) -> batch_pb2.Batch:
        async with self._engine.connect() as connection:
            found = await storage.read_batch(connection, batch_id, user_id)
            if found is None:
                raise not_found("batch_id", str(batch_id))
            forecast = await self._forecaster.forecast(connection, found)
        return to_batch(found, forecast.end)

    async def _answer(
        self, accepted: Acceptance, *, forecast: bool = True
    ) -> batch_service_pb2.ScheduleBatchResponse:
        if accepted.record is not None and not accepted.batch_id:
            async with snapshot(self._engine) as connection:
                planned = await self._forecaster.forecast_planned(
                    connection, accepted.record.sender_id, accepted.planned
                )
            answer = _response(accepted, accepted.record, accepted.rejections, planned)
            answer.batch.ClearField("batch_id")
            answer.batch.ClearField("etag")
            return answer
        bind_contextvars(batch_id=accepted.batch_id)
        if accepted.record is not None and accepted.forecast is not None and not forecast:
            return _response(accepted, accepted.record, accepted.rejections, accepted.forecast)
        async with self._engine.connect() as connection:
            found = accepted.record or await storage.read_batch(
                connection, accepted.batch_id, accepted.user_id
            )
            if found is None:
                raise _lost_again(accepted.batch_id)
            rejections = accepted.rejections
            if not rejections:
                rejections, _ = await storage.list_rejections(
                    connection, found.batch_id, 0, bounds.MAX_SHOWN_REJECTIONS
                )
            known = await self._forecaster.forecast(connection, found)
        return _response(accepted, found, rejections, known)


def _asked(request: _NewBatch) -> tuple[str | None, BatchOptions, RecordedChange]:
    """Return the user to act for, the options of the new batch, and who asks for it."""
    wrong = Violations()
    with wrong:
        check_origin(request)
    user_id, options = checked_options(
        request.options, validate_only=request.validate_only, found=wrong
    )
    return user_id, options, requested_change(request)


def _lost_again(batch_id: int) -> Unavailable:
    """Return the error of a batch that was stored, and is not in PostgreSQL a moment later.

    A failover to a replica that was behind may lose a commit that was confirmed. The caller repeats
    the request, which then accepts the batch.
    """
    return Unavailable(
        "the database lost the batch while it was accepted; try again with the same request_id",
        reason="DATABASE_UNAVAILABLE",
        metadata={"batch_id": str(batch_id)},
    )


def _response(
    accepted: Acceptance,
    batch: storage.BatchRecord,
    rejections: Sequence[RowRejection],
    forecast: BatchForecast,
) -> batch_service_pb2.ScheduleBatchResponse:
    return batch_service_pb2.ScheduleBatchResponse(
        batch=to_batch(batch, forecast.end),
        rejections=to_rejections(rejections),
        replayed=accepted.replayed,
        forecast_end_time=None if forecast.end is None else to_timestamp(forecast.end),
        notices=[*forecast.notices, *accepted.notices],
    )


def _is_small(request: batch_service_pb2.ScheduleBatchRequest) -> bool:
    """Return whether the batch may be read in the event loop."""
    if request.ByteSize() > MOST_SMALL_BYTES:
        return False
    # A line of a CSV is at most one row.
    lines = request.csv.count(b"\n") + request.csv.count(b"\r")
    return len(request.recipients.rows) <= MOST_SMALL_ROWS and lines <= MOST_SMALL_ROWS


def _payload(
    request: batch_service_pb2.ScheduleBatchRequest | batch_service_pb2.PreviewBatchRequest,
) -> Payload:
    match request.WhichOneof("payload"):
        case "csv":
            return CsvPayload(WholeFile(request.csv))
        case "recipients" if request.recipients.rows:
            rows = request.recipients.rows
            return RowsPayload(map(_raw_row, rows), len(rows))
    raise InvalidInput.field(
        "payload",
        "must have recipients: set `csv` or at least one of `recipients.rows`",
        reason="PAYLOAD_REQUIRED",
    )


def _raw_row(row: batch_pb2.Recipient) -> RawRow:
    return RawRow(row.email, dict(row.columns), row.external_id, dict(row.labels))


async def _chunks(
    messages: AsyncIterator[batch_service_pb2.UploadBatchRequest],
) -> AsyncIterator[bytes]:
    async for message in messages:
        if message.WhichOneof("part") != "chunk":
            raise _out_of_order("chunk", "must be set in every message after the first")
        yield message.chunk


async def _pieces(
    first: batch_service_pb2.UploadBatchFileRequest,
    others: AsyncIterator[batch_service_pb2.UploadBatchFileRequest],
) -> AsyncIterator[bytes]:
    yield first.file.data
    async for message in others:
        yield message.file.data


def _out_of_order(field: str, message: str) -> InvalidInput:
    return InvalidInput.field(field, message, reason="UPLOAD_OUT_OF_ORDER")
