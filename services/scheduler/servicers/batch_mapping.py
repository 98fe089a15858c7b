"""Converts batches to protos."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp
from outbox.v1 import batch_pb2

from outbox_server.services.scheduler.storage.batches import BatchRecord
from outbox_server.shared.rpc.proto_mapping import (
    id_text,
    to_duration,
    to_job_counts,
    to_timestamp,
)
from outbox_server.shared.states import BatchMode, BatchState, DuplicatePolicy

_DUPLICATES: Final = {
    DuplicatePolicy.KEEP_FIRST: batch_pb2.DUPLICATE_POLICY_KEEP_FIRST,
    DuplicatePolicy.KEEP_ALL: batch_pb2.DUPLICATE_POLICY_KEEP_ALL,
}
_MODES: Final = {
    BatchMode.PERMISSIVE: batch_pb2.BATCH_MODE_PERMISSIVE,
    BatchMode.STRICT: batch_pb2.BATCH_MODE_STRICT,
}
# The fields that no stored answer has: they may be long, and EraseRecipient may erase them.
LONG_OR_PERSONAL: Final = (
    *("subject", "body", "html", "reply_to", "headers"),
    *("external_id", "labels"),
)


def to_batch(record: BatchRecord, forecast: datetime | None = None) -> batch_pb2.Batch:
    """Return the proto of a batch. `forecast` is when its last mail will be sent."""
    batch = batch_pb2.Batch(
        batch_id=id_text(record.batch_id),
        user_id=record.user_id,
        sender_id=id_text(record.sender_id),
        request_id=record.request_id,
        subject=record.subject,
        body=record.body,
        html=record.html,
        schedule_time=to_timestamp(record.start_at),
        spacing=to_duration(timedelta(milliseconds=record.spacing_ms)),
        duplicates=_DUPLICATES[record.duplicates],
        mode=_MODES[record.mode],
        state=_state(record),
        accepted_count=record.accepted_count,
        rejected_count=record.rejected_count,
        duplicate_count=record.duplicate_count,
        suppressed_count=record.suppressed_count,
        counts=to_job_counts(record.counts),
        create_time=to_timestamp(record.created_at),
        cancel_time=_timestamp(record.cancelled_at),
        forecast_end_time=_timestamp(forecast),
        email_column=record.email_column or "",
        etag=batch_etag(record.state, record.revision),
        reply_to=record.reply_to or "",
        headers=[batch_pb2.MailHeader(name=name, value=text) for name, text in record.headers],
        name_column=record.name_column or "",
        external_id=record.external_id or "",
        labels=record.labels,
        test=record.test,
        pause_time=_timestamp(record.paused_at),
        pause_end_time=_timestamp(record.paused_until),
        rescheduling=record.respreading,
    )
    if record.expire_after_ms is not None:
        batch.expire_after.CopyFrom(to_duration(timedelta(milliseconds=record.expire_after_ms)))
    return batch


def batch_etag(state: BatchState, revision: int) -> str:
    """Return the etag of a batch. A cancellation, the last change, has no revision of its own."""
    return f"{state.value}.{revision}"


def _state(record: BatchRecord) -> batch_pb2.BatchState.ValueType:
    if record.state is BatchState.CANCELLED:
        return batch_pb2.BATCH_STATE_CANCELLED
    # DONE is not stored, because the statement that ends the last job would have to write it.
    if not record.counts.open:
        return batch_pb2.BATCH_STATE_DONE
    # The end of a pause is not stored either.
    return (
        batch_pb2.BATCH_STATE_ACTIVE if record.paused_at is None else batch_pb2.BATCH_STATE_PAUSED
    )


def _timestamp(time: datetime | None) -> Timestamp | None:
    return None if time is None else to_timestamp(time)
