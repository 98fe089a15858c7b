"""Implements BatchService."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import astuple
from datetime import timedelta
from typing import Final

from outbox.v1 import batch_pb2, batch_service_pb2, batch_service_pb2_grpc
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.services.scheduler.changes import Changes, Made, check_etag
from outbox_server.services.scheduler.forecasts import Forecaster
from outbox_server.services.scheduler.previewing import Previewer
from outbox_server.services.scheduler.servicers.batch_acceptance import BatchAcceptance
from outbox_server.services.scheduler.servicers.batch_control import BatchControl
from outbox_server.services.scheduler.servicers.batch_mapping import (
    LONG_OR_PERSONAL,
    batch_etag,
    to_batch,
)
from outbox_server.services.scheduler.servicers.batch_requests import payload_of
from outbox_server.services.scheduler.servicers.calls import (
    Context,
    acting_user,
    checked_options,
    errors_name,
    listed_user,
)
from outbox_server.services.scheduler.servicers.preview_mapping import to_preview
from outbox_server.services.scheduler.storage import batches as storage
from outbox_server.services.scheduler.storage.cancelling import cancel_batch
from outbox_server.services.scheduler.sweeping import Sweeper
from outbox_server.shared.callers import in_parts
from outbox_server.shared.errors import InvalidInput, Violations
from outbox_server.shared.filters.fields import (
    FieldTest,
    both,
    required_value,
)
from outbox_server.shared.filters.resources import (
    BATCH_FIELDS,
    BATCH_ORDERS,
    REJECTION_FIELDS,
    REJECTION_ORDERS,
    checked_list,
)
from outbox_server.shared.heads.loader import HeadLoader, load_soon
from outbox_server.shared.intake.option_mapping import to_rejections
from outbox_server.shared.rpc import page_tokens
from outbox_server.shared.rpc.paging import requested_page
from outbox_server.shared.rpc.proto_mapping import not_found, parse_id
from outbox_server.shared.rpc.watching import Watch
from outbox_server.shared.states import BatchState

_WATCHED: Final = "watched batch"
# The rows of a cancelled batch with at most this many jobs are updated before the call returns.
_SWEPT_IN_CALL: Final = 5_000
# Loading a head takes 0.4 s after a million cancelled rows. The caller waits no longer than this.
_LOAD_LIMIT: Final = timedelta(seconds=1)


class BatchServicer(batch_service_pb2_grpc.BatchServiceServicer):
    """Accepts, reads, watches and cancels batches."""

    def __init__(
        self,
        engine: AsyncEngine,
        loader: HeadLoader,
        forecaster: Forecaster,
        *,
        acceptance: BatchAcceptance,
        sweeper: Sweeper,
        watch: Watch[storage.BatchRecord],
        changes: Changes,
        previewer: Previewer,
        control: BatchControl,
    ) -> None:
        self._acceptance = acceptance
        self._control = control
        self._changes = changes
        self._previewer = previewer
        self._watch = watch
        self._engine = engine
        self._sweeper = sweeper
        self._loader = loader
        self._forecaster = forecaster

    async def ScheduleBatch(
        self,
        request: batch_service_pb2.ScheduleBatchRequest,
        context: Context,
    ) -> batch_service_pb2.ScheduleBatchResponse:
        """Accept a batch from one message."""
        return await self._acceptance.schedule(request)

    async def UploadBatch(
        self,
        request_iterator: AsyncIterator[batch_service_pb2.UploadBatchRequest],
        context: Context,
    ) -> batch_service_pb2.ScheduleBatchResponse:
        """Accept a batch from a CSV in chunks."""
        return await self._acceptance.upload(request_iterator)

    async def UploadBatchFile(
        self,
        request_iterator: AsyncIterator[batch_service_pb2.UploadBatchFileRequest],
        context: Context,
    ) -> batch_service_pb2.ScheduleBatchResponse:
        """Accept a batch from a CSV that is the body of an HTTP request."""
        return await self._acceptance.upload_file(request_iterator)

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
                options, payload_of(request), request.row_numbers, user_id
            )
        return to_preview(found)

    async def SendTestEmail(
        self,
        request: batch_service_pb2.SendTestEmailRequest,
        context: Context,
    ) -> batch_service_pb2.SendTestEmailResponse:
        """Accept one mail as a test."""
        return await self._acceptance.send_test(request)

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
        sender_id = parse_id(request.sender_id, "sender_id") if request.sender_id else None
        if sender_id is not None:
            tree = both(tree, FieldTest("sender_id", "=", sender_id))
        user_id = listed_user(request.user_id, narrowed=required_value(tree, "sender_id")[0])
        start = (page_tokens.MAX_ID if descending else 0,)
        page = requested_page(request, "batches", user_id, sender_id, start=start)
        async with self._engine.connect() as connection:
            found, reached = await storage.list_batches(
                connection, user_id, tree, *page.after, page.limit, descending=descending
            )
        shown, token = page.cut(
            found, lambda batch: (batch.batch_id,), None if reached is None else (reached,)
        )
        return batch_service_pb2.ListBatchesResponse(
            batches=await in_parts(shown, to_batch), next_page_token=token
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
        start = (page_tokens.MAX_ID if descending else 0,)
        page = requested_page(request, "rejections", user_id, batch_id, start=start)
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
