"""Answers AuditSender: converts protos to the audit of a sender and back."""

from __future__ import annotations

from datetime import UTC, datetime

from outbox.v1 import stats_service_pb2
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.services.stats import storage
from outbox_server.shared.audit.sender import audit_sender
from outbox_server.shared.audit.storage import Interval
from outbox_server.shared.errors import InvalidInput
from outbox_server.shared.forecast.pace import Rules
from outbox_server.shared.rpc.proto_mapping import from_timestamp, not_found, parse_id, to_duration


async def audit(
    engine: AsyncEngine,
    request: stats_service_pb2.AuditSenderRequest,
    user_id: str | None,
    interval: Interval,
    rules: Rules,
) -> stats_service_pb2.AuditSenderResponse:
    """Answer AuditSender.

    Raises:
        NotFound: SENDER_NOT_FOUND.
    """
    sender_id = parse_id(request.sender_id, "sender_id")
    async with storage.snapshot(engine) as connection:
        found = await audit_sender(
            connection,
            sender_id,
            user_id,
            interval,
            floor=rules.floor,
            window=rules.window,
            lease=rules.lease,
        )
    if found is None:
        raise not_found("sender_id", request.sender_id)
    return stats_service_pb2.AuditSenderResponse(
        least_gap=None if found.least_gap is None else to_duration(found.least_gap),
        most_in_window_count=found.most_in_window,
        window=to_duration(rules.window),
        sent_count=found.sent,
        lost_count=found.lost,
        duplicate_count=found.duplicates,
        effective_min_gap=to_duration(found.effective_min_gap),
        hourly_limit=found.hourly_limit,
    )


def requested_interval(request: stats_service_pb2.AuditSenderRequest) -> Interval:
    """Return the interval of a request.

    Raises:
        InvalidInput: INTERVAL_INVALID, or a time is out of range.
    """
    start = end = None
    if request.HasField("start_time"):
        start = from_timestamp(request.start_time, "start_time")
    if request.HasField("end_time"):
        end = from_timestamp(request.end_time, "end_time")
    if start is not None and end is None and start >= datetime.now(UTC):
        raise InvalidInput.field("start_time", "must be in the past", reason="INTERVAL_INVALID")
    if start is not None and end is not None and end <= start:
        raise InvalidInput.field(
            "end_time", "must be later than start_time", reason="INTERVAL_INVALID"
        )
    # A start in the year 1 means all attempts.
    if start is not None and start.year <= 1:
        start = None
    return Interval(start, end)
