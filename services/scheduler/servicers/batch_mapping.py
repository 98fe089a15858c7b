"""Converts batches, their options and rejections from and to protos."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Final, Literal

from google.protobuf.timestamp_pb2 import Timestamp
from outbox.v1 import batch_pb2

from outbox_server.services.scheduler.batch_options import BatchOptions, check_options
from outbox_server.services.scheduler.rows import RowRejection
from outbox_server.services.scheduler.servicers.calls import whole_ms
from outbox_server.services.scheduler.storage.batches import BatchRecord
from outbox_server.shared.rpc.proto_mapping import (
    from_timestamp,
    id_text,
    parse_id,
    to_duration,
    to_job_counts,
    to_timestamp,
)
from outbox_server.shared.states import BatchMode, BatchState, DuplicatePolicy, requested_enum

_DUPLICATES: Final = {
    DuplicatePolicy.KEEP_FIRST: batch_pb2.DUPLICATE_POLICY_KEEP_FIRST,
    DuplicatePolicy.KEEP_ALL: batch_pb2.DUPLICATE_POLICY_KEEP_ALL,
}
_MODES: Final = {
    BatchMode.PERMISSIVE: batch_pb2.BATCH_MODE_PERMISSIVE,
    BatchMode.STRICT: batch_pb2.BATCH_MODE_STRICT,
}


def from_options(options: batch_pb2.BatchOptions) -> BatchOptions:
    """Check the options and return them. Unset options get their defaults.

    Raises:
        InvalidInput: an option is wrong.
        NotFound: SENDER_NOT_FOUND: the sender's id is not a number.
    """
    spacing = whole_ms(options.spacing, "options.spacing") if options.HasField("spacing") else 0
    expire_after = (
        whole_ms(options.expire_after, "options.expire_after")
        if options.HasField("expire_after")
        else None
    )
    return check_options(
        BatchOptions(
            request_id=options.request_id,
            sender_id=parse_id(options.sender_id, "options.sender_id"),
            subject=options.subject if options.HasField("subject") else None,
            body=options.body if options.HasField("body") else None,
            html=options.html if options.HasField("html") else None,
            schedule_time=_time(options, "schedule_time"),
            spacing_ms=spacing,
            duplicates=requested_enum(DuplicatePolicy, options.duplicates, "options.duplicates")
            or DuplicatePolicy.KEEP_FIRST,
            mode=requested_enum(BatchMode, options.mode, "options.mode") or BatchMode.PERMISSIVE,
            time_zone=options.time_zone or "UTC",
            expire_after_ms=expire_after,
            spread_until=_time(options, "spread_until"),
        )
    )


def _time(
    options: batch_pb2.BatchOptions, name: Literal["schedule_time", "spread_until"]
) -> datetime | None:
    if not options.HasField(name):
        return None
    return from_timestamp(getattr(options, name), f"options.{name}")


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
    )
    if record.expire_after_ms is not None:
        batch.expire_after.CopyFrom(to_duration(timedelta(milliseconds=record.expire_after_ms)))
    return batch


def _state(record: BatchRecord) -> batch_pb2.BatchState.ValueType:
    if record.state is BatchState.CANCELLED:
        return batch_pb2.BATCH_STATE_CANCELLED
    # DONE is not stored, because the statement that ends the last job would have to write it.
    return batch_pb2.BATCH_STATE_ACTIVE if record.counts.open else batch_pb2.BATCH_STATE_DONE


def _timestamp(time: datetime | None) -> Timestamp | None:
    return None if time is None else to_timestamp(time)


def to_rejections(rejections: Iterable[RowRejection]) -> list[batch_pb2.Rejection]:
    """Return the protos of rejections."""
    return [
        batch_pb2.Rejection(
            row_number=rejection.row_number,
            column=rejection.column,
            reason=rejection.reason,
            message=rejection.message,
        )
        for rejection in rejections
    ]
