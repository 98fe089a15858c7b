"""Answers QuerySenderSeries: a sender's results over time, from its recorded attempts."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from outbox.v1 import stats_pb2, stats_service_pb2
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.services.stats import storage
from outbox_server.shared.errors import InvalidInput, Violations
from outbox_server.shared.rpc.proto_mapping import (
    from_duration,
    from_timestamp,
    not_found,
    parse_id,
    to_duration,
    to_timestamp,
)

_MINUTE: Final = timedelta(minutes=1)
_DAY: Final = timedelta(days=1)
_MOST_BUCKETS: Final = 10_000
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_LAST: Final = datetime(9999, 12, 31, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Buckets:
    """Buckets of `length` from `start`, a multiple of it, to `end`. The last may be shorter."""

    start: datetime
    end: datetime
    length: timedelta

    def starts(self) -> list[datetime]:
        """Return the start of each bucket."""
        count = -(-(self.end - self.start) // self.length)
        return [self.start + number * self.length for number in range(count)]


def check_buckets(
    start: datetime | None, end: datetime | None, length: timedelta | None, now: datetime
) -> Buckets:
    """Return the requested buckets. None means the default.

    Raises:
        InvalidInput: BUCKET_INVALID, INTERVAL_INVALID.
    """
    length = timedelta(hours=1) if length is None else length
    wrong = Violations()
    with wrong:
        if not _MINUTE <= length <= _DAY or length % _MINUTE or _DAY % length:
            raise InvalidInput.field(
                "bucket",
                "must be a whole number of minutes that divides a day: 1m to 24h, such as 5m or 1h",
                reason="BUCKET_INVALID",
            )
    end = now if end is None else end
    if start is None:
        start = max(end, _EPOCH + _DAY) - _DAY
    with wrong:
        if start >= end:
            raise InvalidInput.field(
                "end_time", "must be later than start_time", reason="INTERVAL_INVALID"
            )
    with wrong:
        if not start >= _EPOCH or end > _LAST:
            raise InvalidInput.field(
                "start_time",
                "must not be before 1970, and end_time not after 9999",
                reason="INTERVAL_INVALID",
            )
    wrong.raise_any()
    buckets = Buckets(start - (start - _EPOCH) % length, end, length)
    if (buckets.end - buckets.start) / length > _MOST_BUCKETS:
        raise InvalidInput.field(
            "bucket",
            f"must give at most {_MOST_BUCKETS:,} buckets; use a longer bucket",
            reason="BUCKET_INVALID",
        )
    return buckets


def requested_buckets(request: stats_service_pb2.QuerySenderSeriesRequest) -> Buckets:
    """Return the buckets of a request.

    Raises:
        InvalidInput: BUCKET_INVALID, INTERVAL_INVALID, or a time or duration is out of range.
    """
    start = end = length = None
    wrong = Violations()
    if request.HasField("start_time"):
        start = wrong.value(lambda: from_timestamp(request.start_time, "start_time"), None)
    if request.HasField("end_time"):
        end = wrong.value(lambda: from_timestamp(request.end_time, "end_time"), None)
    if request.HasField("bucket"):
        length = wrong.value(lambda: from_duration(request.bucket, "bucket"), None)
    now = datetime.now(UTC)
    found = wrong.value(
        lambda: check_buckets(start, end, length, now), Buckets(now, now, timedelta(0))
    )
    wrong.raise_any()
    return found


async def series(
    engine: AsyncEngine,
    request: stats_service_pb2.QuerySenderSeriesRequest,
    user_id: str | None,
    buckets: Buckets,
) -> stats_service_pb2.QuerySenderSeriesResponse:
    """Answer QuerySenderSeries.

    Raises:
        NotFound: SENDER_NOT_FOUND.
    """
    sender_id = parse_id(request.sender_id, "sender_id")
    async with storage.snapshot(engine) as connection:
        if not await storage.sender_exists(connection, sender_id, user_id):
            raise not_found("sender_id", request.sender_id)
        found = await storage.read_series(
            connection, sender_id, buckets.start, buckets.end, buckets.length
        )
    return stats_service_pb2.QuerySenderSeriesResponse(
        points=[_point(start, found.get(start)) for start in buckets.starts()]
    )


def _point(start: datetime, row: storage.BucketCounts | None) -> stats_pb2.SeriesPoint:
    point = stats_pb2.SeriesPoint(start_time=to_timestamp(start))
    if row is None:
        return point
    point.sent_count = row.sent
    point.failed_count = row.failed
    point.retried_count = row.retried
    point.late_count = row.late
    points = (point.lateness_p50, point.lateness_p95, point.lateness_p99)
    for field, lateness in zip(points, row.lateness, strict=False):
        field.CopyFrom(to_duration(lateness))
    return point
