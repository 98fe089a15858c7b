"""From a stored sender to the proto."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from outbox.v1 import sender_pb2

from services.scheduler.limits import Limits
from services.scheduler.storage.senders import SenderRecord
from shared.proto_mapping import id_text, to_duration, to_timestamp
from shared.sending_hours import SendingHours
from shared.states import SenderState, SmtpSecurity

_STATES = {
    SenderState.ACTIVE: sender_pb2.SENDER_STATE_ACTIVE,
    SenderState.PAUSED: sender_pb2.SENDER_STATE_PAUSED,
}
_SECURITY = {
    SmtpSecurity.NONE: sender_pb2.SMTP_SECURITY_NONE,
    SmtpSecurity.STARTTLS: sender_pb2.SMTP_SECURITY_STARTTLS,
    SmtpSecurity.TLS: sender_pb2.SMTP_SECURITY_TLS,
}


def to_sender(record: SenderRecord, floor: timedelta) -> sender_pb2.Sender:
    """Return the sender as callers see it; `floor` is OUTBOX_MIN_GAP."""
    limits = Limits.of(record.hourly_limit, record.min_gap_ms, floor)
    sender = sender_pb2.Sender(
        sender_id=id_text(record.sender_id),
        user_id=record.user_id,
        email=record.email,
        display_name=record.display_name,
        hourly_limit=record.hourly_limit,
        max_in_flight=record.max_in_flight,
        state=_STATES[record.state],
        create_time=to_timestamp(record.created_at),
        update_time=to_timestamp(record.updated_at),
        effective_min_gap=to_duration(limits.gap),
        effective_hourly_limit=limits.effective_hourly_limit,
        binding_limit=(
            sender_pb2.BINDING_LIMIT_MIN_GAP
            if limits.gap_binds
            else sender_pb2.BINDING_LIMIT_HOURLY_LIMIT
        ),
    )
    if record.min_gap_ms is not None:
        sender.min_gap.CopyFrom(to_duration(timedelta(milliseconds=record.min_gap_ms)))
    if record.sending_hours is not None:
        sender.sending_hours.CopyFrom(_to_hours(record.sending_hours))
    if record.smtp_host is not None:
        sender.smtp.CopyFrom(_to_endpoint(record))
    return sender


def _to_hours(hours: SendingHours) -> sender_pb2.SendingHours:
    # `from` is a word of Python's.
    fields: dict[str, Any] = {"from": _clock(hours.start), "to": _clock(hours.end)}
    return sender_pb2.SendingHours(
        weekdays=[sender_pb2.Weekday.ValueType(day) for day in sorted(hours.weekdays)],
        time_zone=hours.zone,
        **fields,
    )


def _clock(minutes: int) -> str:
    return f"{minutes // 60:02}:{minutes % 60:02}"


def _to_endpoint(record: SenderRecord) -> sender_pb2.SmtpEndpoint:
    return sender_pb2.SmtpEndpoint(
        host=record.smtp_host or "",
        port=record.smtp_port or 0,
        security=_SECURITY.get(
            record.smtp_security or SmtpSecurity.STARTTLS, sender_pb2.SMTP_SECURITY_UNSPECIFIED
        ),
        username=record.smtp_username or "",
        password_set=record.password_set,
    )
