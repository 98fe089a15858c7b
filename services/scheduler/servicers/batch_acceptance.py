"""Accepts batches and test mails: the methods of BatchService that store new mail."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial

from outbox.v1 import batch_service_pb2
from sqlalchemy.ext.asyncio import AsyncEngine
from structlog.contextvars import bind_contextvars

from outbox_server.services.scheduler.forecasts import BatchForecast, Forecaster
from outbox_server.services.scheduler.intake import Acceptance, Intake, recipient_suppressed
from outbox_server.services.scheduler.previewing import Previewer
from outbox_server.services.scheduler.servicers.batch_mapping import to_batch
from outbox_server.services.scheduler.servicers.batch_requests import (
    asked_batch,
    is_small,
    payload_of,
    raw_row,
    upload_chunks,
)
from outbox_server.services.scheduler.servicers.calls import check_file_type, errors_name
from outbox_server.services.scheduler.servicers.job_mapping import to_job
from outbox_server.services.scheduler.servicers.sample_mail import naming_recipient, options_of_test
from outbox_server.services.scheduler.servicers.uploads import file_pieces, out_of_order
from outbox_server.services.scheduler.storage import batches as storage
from outbox_server.services.scheduler.storage.email_jobs import find_only_job
from outbox_server.shared import bounds
from outbox_server.shared.database.audit_events import RecordedChange
from outbox_server.shared.database.engine import snapshot
from outbox_server.shared.errors import Unavailable, Violations
from outbox_server.shared.intake.batch_options import BatchOptions
from outbox_server.shared.intake.option_mapping import to_rejections
from outbox_server.shared.intake.payloads import (
    CsvPayload,
    Payload,
    RowsPayload,
    StreamedChunks,
)
from outbox_server.shared.intake.rows import RowRejection
from outbox_server.shared.intake.upload_rate import LeastRate
from outbox_server.shared.rpc.proto_mapping import to_timestamp
from outbox_server.shared.rpc.requested_changes import check_origin, requested_change


class BatchAcceptance:
    """Accepts batches from one message, from chunks, or from a file, and test mails."""

    def __init__(
        self,
        engine: AsyncEngine,
        intake: Intake,
        forecaster: Forecaster,
        previewer: Previewer,
        least_rate: LeastRate,
    ) -> None:
        """`least_rate` is that of uploads."""
        self._engine = engine
        self._intake = intake
        self._forecaster = forecaster
        self._previewer = previewer
        self._least_rate = least_rate

    async def schedule(
        self, request: batch_service_pb2.ScheduleBatchRequest
    ) -> batch_service_pb2.ScheduleBatchResponse:
        """Accept a batch from one message.

        Raises:
            InvalidInput: an option, a template or the payload is invalid.
            Other errors: see `Intake.accept`.
        """
        user_id, options, change = asked_batch(request)
        bind_contextvars(request_id=options.request_id)
        payload = partial(payload_of, request)
        accept = self._intake.accept_small if is_small(request) else self._accept_whole
        if request.validate_only:
            accept = partial(self._accept_whole, validate_only=True)
        with errors_name(request.WhichOneof("payload") or "payload"):
            accepted = await accept(options, payload, user_id, change)
        return await self._answer(accepted, forecast=request.require_forecast)

    async def _accept_whole(
        self,
        options: BatchOptions,
        payload: Callable[[], Payload],
        user_id: str | None,
        change: RecordedChange,
        *,
        validate_only: bool = False,
    ) -> Acceptance:
        return await self._intake.accept(
            options, payload(), user_id, change, validate_only=validate_only
        )

    async def upload(
        self, requests: AsyncIterator[batch_service_pb2.UploadBatchRequest]
    ) -> batch_service_pb2.ScheduleBatchResponse:
        """Accept a batch from a CSV in chunks.

        Raises:
            InvalidInput: UPLOAD_OUT_OF_ORDER.
            Other errors: as `schedule`.
        """
        messages = self._least_rate.keep(aiter(requests))
        first = await anext(messages, None)
        if first is None or first.WhichOneof("part") != "options":
            raise out_of_order("options", "must be set in the first message")
        user_id, options, change = asked_batch(first)
        bind_contextvars(request_id=options.request_id)
        payload = CsvPayload(StreamedChunks(upload_chunks(messages)))
        with errors_name("chunk"):
            accepted = await self._intake.accept(
                options, payload, user_id, change, validate_only=first.validate_only
            )
        return await self._answer(accepted)

    async def upload_file(
        self, requests: AsyncIterator[batch_service_pb2.UploadBatchFileRequest]
    ) -> batch_service_pb2.ScheduleBatchResponse:
        """Accept a batch from a CSV that is the body of an HTTP request.

        Raises:
            InvalidInput: UPLOAD_OUT_OF_ORDER, FILE_TYPE_INVALID.
            Other errors: as `schedule`.
        """
        messages = self._least_rate.keep(aiter(requests))
        first = await anext(messages, None)
        if first is None:
            raise out_of_order("options", "must be set in the first message")
        user_id, options, change = asked_batch(first)
        bind_contextvars(request_id=options.request_id)
        check_file_type(first.file.content_type)
        payload = CsvPayload(StreamedChunks(file_pieces(first.file.data, messages)))
        with errors_name("file"):
            accepted = await self._intake.accept(
                options, payload, user_id, change, validate_only=first.validate_only
            )
        return await self._answer(accepted)

    async def send_test(
        self, request: batch_service_pb2.SendTestEmailRequest
    ) -> batch_service_pb2.SendTestEmailResponse:
        """Accept one mail as a test.

        Raises:
            FailedPrecondition: RECIPIENT_SUPPRESSED.
            Other errors: as `schedule`.
        """
        wrong = Violations()
        with wrong:
            check_origin(request)
        user_id, options = options_of_test(request.options, wrong)
        change = requested_change(request)
        bind_contextvars(request_id=options.request_id)
        row = request.recipient
        payload = RowsPayload([raw_row(row)], 1)
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
