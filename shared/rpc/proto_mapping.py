"""Converts between protos and Python's types: ids, times, durations, counts."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from outbox.v1 import email_job_pb2, sender_pb2

from outbox_server.shared.cooldowns.record import CooldownRecord
from outbox_server.shared.database.counts import JobCounts
from outbox_server.shared.errors import InvalidInput, NotFound
from outbox_server.shared.quoting import quoted
from outbox_server.shared.rpc.page_tokens import MAX_ID

# The ids that `id_text` writes: ASCII, no sign, no leading zero, so that each has one spelling.
_ID: Final = re.compile(r"[1-9][0-9]{0,18}", re.ASCII)
_MAX_SHOWN_ID: Final = 40


def id_text(number: int) -> str:
    """Return the id that callers see, which is opaque to them."""
    return str(number)


def parse_id(text: str, field: str) -> int:
    """Return the database's id. `field`, such as `sender_id`, is its path in the request.

    Raises:
        InvalidInput: it is empty (SENDER_ID_REQUIRED for the field `sender_id`).
        NotFound: it is not in the form of an id, so no resource has it (SENDER_NOT_FOUND).
    """
    if not text:
        raise InvalidInput.field(field, "must be set", reason=f"{_leaf(field)}_REQUIRED")
    if _ID.fullmatch(text) is None or int(text) > MAX_ID:
        raise not_found(field, text)
    return int(text)


# What retention removes.
_REMOVED: Final = ("batch", "e-mail job")


def not_found(field: str, text: str) -> NotFound:
    """Return the error for an id that no resource of this user has.

    `field`, such as `sender_id`, decides the reason, such as SENDER_NOT_FOUND.
    """
    leaf = _leaf(field)
    thing = leaf.removesuffix("_ID")
    words = thing.lower().replace("_", " ").replace("email", "e-mail")
    removed = ", or it was removed after OUTBOX_RETENTION" if words in _REMOVED else ""
    return NotFound(
        f"there is no {words} {quoted(text, _MAX_SHOWN_ID)}{removed}",
        reason=f"{thing}_NOT_FOUND",
        metadata={leaf.lower(): text},
    )


def to_timestamp(time: datetime) -> Timestamp:
    """Return the proto of a time with a time zone."""
    stamp = Timestamp()
    stamp.FromDatetime(time)
    return stamp


def from_timestamp(stamp: Timestamp, field: str) -> datetime:
    """Return the UTC time, its fraction cut to whole us. `field` is its path in the request.

    Raises:
        InvalidInput: it is outside of the years 1 to 9999, or its nanos are.
    """
    try:
        return stamp.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise InvalidInput.field(
            field, "must be from 0001-01-01T00:00:00Z to 9999-12-31T23:59:59.999999999Z"
        ) from None


def to_duration(span: timedelta) -> Duration:
    """Return the proto of a length of time."""
    duration = Duration()
    duration.FromTimedelta(span)
    return duration


def from_duration(duration: Duration, field: str) -> timedelta:
    """Return the length of time, cut to whole us. `field` is its path in the request.

    Raises:
        InvalidInput: it is longer than 10,000 years, or its nanos do not fit its seconds.
    """
    try:
        duration.ToJsonString()  # the only method that checks the bounds
        return duration.ToTimedelta()
    except (ValueError, OverflowError):
        raise InvalidInput.field(
            field, "must be within 10,000 years, with nanos of the same sign as its seconds"
        ) from None


def whole_ms(duration: Duration, field: str) -> int:
    """Return the duration in ms, rounded up.

    Raises:
        InvalidInput: it is not a valid duration.
    """
    from_duration(duration, field)
    return -(-(duration.seconds * 1_000_000_000 + duration.nanos) // 1_000_000)


def to_job_counts(counts: JobCounts) -> email_job_pb2.EmailJobCounts:
    """Return the proto of counts by state."""
    return email_job_pb2.EmailJobCounts(
        scheduled_count=counts.scheduled,
        sending_count=counts.sending,
        sent_count=counts.sent,
        failed_count=counts.failed,
        uncertain_count=counts.uncertain,
        cancelled_count=counts.cancelled,
        suppressed_count=counts.suppressed,
        expired_count=counts.expired,
    )


def to_cooldown(cooldown: CooldownRecord | None) -> sender_pb2.Cooldown | None:
    """Return the proto of a cooldown; None if there is none."""
    if cooldown is None:
        return None
    return sender_pb2.Cooldown(
        start_time=to_timestamp(cooldown.since),
        next_probe_time=to_timestamp(cooldown.next_probe_at),
        refusal_count=cooldown.refusals,
        smtp_code=cooldown.smtp_code,
        enhanced_code=cooldown.enhanced_code or "",
        message=cooldown.message,
    )


def _leaf(field: str) -> str:
    """Return `SENDER_ID` for `sender.sender_id`."""
    return field.rpartition(".")[2].upper()
