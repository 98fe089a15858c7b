"""What the requests of a new batch have: the options, and the recipients in each of their forms."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TypeAlias

from outbox.v1 import batch_pb2, batch_service_pb2

from outbox_server.services.scheduler.servicers.calls import checked_options
from outbox_server.services.scheduler.servicers.uploads import out_of_order
from outbox_server.services.scheduler.small_batches import MOST_SMALL_BYTES, MOST_SMALL_ROWS
from outbox_server.shared.database.audit_events import RecordedChange
from outbox_server.shared.errors import InvalidInput, Violations
from outbox_server.shared.intake.batch_options import BatchOptions
from outbox_server.shared.intake.payloads import CsvPayload, Payload, RowsPayload, WholeFile
from outbox_server.shared.intake.rows import RawRow
from outbox_server.shared.rpc.requested_changes import check_origin, requested_change

NewBatch: TypeAlias = (
    batch_service_pb2.ScheduleBatchRequest
    | batch_service_pb2.UploadBatchRequest
    | batch_service_pb2.UploadBatchFileRequest
)


def asked_batch(request: NewBatch) -> tuple[str | None, BatchOptions, RecordedChange]:
    """Return the user to act for, the options of the new batch, and who asks for it."""
    wrong = Violations()
    with wrong:
        check_origin(request)
    user_id, options = checked_options(
        request.options, validate_only=request.validate_only, found=wrong
    )
    return user_id, options, requested_change(request)


def is_small(request: batch_service_pb2.ScheduleBatchRequest) -> bool:
    """Return whether the batch may be read in the event loop."""
    # The size of a large message takes long to find.
    if len(request.csv) > MOST_SMALL_BYTES or len(request.recipients.rows) > MOST_SMALL_ROWS:
        return False
    # A line of a CSV is at most one row.
    lines = request.csv.count(b"\n") + request.csv.count(b"\r")
    return lines <= MOST_SMALL_ROWS and request.ByteSize() <= MOST_SMALL_BYTES


def payload_of(
    request: batch_service_pb2.ScheduleBatchRequest | batch_service_pb2.PreviewBatchRequest,
) -> Payload:
    """Return the recipients of a request of one message.

    Raises:
        InvalidInput: PAYLOAD_REQUIRED.
    """
    match request.WhichOneof("payload"):
        case "csv":
            return CsvPayload(WholeFile(request.csv))
        case "recipients" if request.recipients.rows:
            rows = request.recipients.rows
            return RowsPayload(map(raw_row, rows), len(rows))
    raise InvalidInput.field(
        "payload",
        "must have recipients: set `csv` or at least one of `recipients.rows`",
        reason="PAYLOAD_REQUIRED",
    )


def raw_row(row: batch_pb2.Recipient) -> RawRow:
    """Return a recipient as the reader of rows takes it."""
    return RawRow(row.email, dict(row.columns), row.external_id, dict(row.labels))


async def upload_chunks(
    messages: AsyncIterator[batch_service_pb2.UploadBatchRequest],
) -> AsyncIterator[bytes]:
    """Yield the CSV of the messages after the first one.

    Raises:
        InvalidInput: UPLOAD_OUT_OF_ORDER.
    """
    async for message in messages:
        if message.WhichOneof("part") != "chunk":
            raise out_of_order("chunk", "must be set in every message after the first")
        yield message.chunk
