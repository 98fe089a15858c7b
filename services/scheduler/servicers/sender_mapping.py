"""Converts stored senders and verifications to protos."""

from __future__ import annotations

from dataclasses import asdict
from datetime import timedelta
from typing import Any, Final

from google.protobuf import json_format
from outbox.v1 import email_job_pb2, sender_pb2, sender_service_pb2

from outbox_server.services.scheduler.effective_limits import EffectiveLimits
from outbox_server.services.scheduler.limits import Limits
from outbox_server.services.scheduler.storage.senders import SenderRecord
from outbox_server.services.scheduler.verifying import Verification
from outbox_server.shared.cooldowns.record import CooldownRecord
from outbox_server.shared.gap import effective_gap
from outbox_server.shared.rpc.proto_mapping import id_text, to_cooldown, to_duration, to_timestamp
from outbox_server.shared.sending_hours import SendingHours
from outbox_server.shared.smtp.replies import Phase
from outbox_server.shared.states import SenderState, SmtpSecurity

_STATES = {
    SenderState.ACTIVE: sender_pb2.SENDER_STATE_ACTIVE,
    SenderState.PAUSED: sender_pb2.SENDER_STATE_PAUSED,
}
_SECURITY = {
    SmtpSecurity.NONE: sender_pb2.SMTP_SECURITY_NONE,
    SmtpSecurity.STARTTLS: sender_pb2.SMTP_SECURITY_STARTTLS,
    SmtpSecurity.TLS: sender_pb2.SMTP_SECURITY_TLS,
}


_STEPS = {
    Phase.CONNECT: sender_service_pb2.SMTP_STEP_CONNECT,
    Phase.STARTTLS: sender_service_pb2.SMTP_STEP_TLS,
    Phase.EHLO: sender_service_pb2.SMTP_STEP_EHLO,
    Phase.AUTH: sender_service_pb2.SMTP_STEP_AUTH,
    Phase.MAIL: sender_service_pb2.SMTP_STEP_MAIL,
    Phase.RCPT: sender_service_pb2.SMTP_STEP_RCPT,
}


def to_sender(record: SenderRecord, floor: timedelta) -> sender_pb2.Sender:
    """Return the proto of a sender. `floor` is OUTBOX_MIN_GAP."""
    limits = Limits(record.hourly_limit, effective_gap(record.min_gap_ms, floor))
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
        cooldown=to_cooldown(record.cooldown),
        etag=etag_of(record),
        pause_end_time=None if record.paused_until is None else to_timestamp(record.paused_until),
    )
    if record.min_gap_ms is not None:
        sender.min_gap.CopyFrom(to_duration(timedelta(milliseconds=record.min_gap_ms)))
    if record.sending_hours is not None:
        sender.sending_hours.CopyFrom(_to_hours(record.sending_hours))
    if record.smtp_host is not None:
        sender.smtp.CopyFrom(_to_endpoint(record))
    return sender


def to_effective_limits(
    found: EffectiveLimits, cooldown: CooldownRecord | None
) -> sender_pb2.EffectiveLimits:
    """Return the proto of the limits in effect."""
    hourly, gap, most = found.hourly_limit, found.min_gap, found.max_in_flight
    return sender_pb2.EffectiveLimits(
        hourly_limit=hourly[0],
        hourly_limit_source=sender_pb2.LimitSource.ValueType(hourly[1]),
        min_gap=to_duration(gap[0]),
        min_gap_source=sender_pb2.LimitSource.ValueType(gap[1]),
        max_in_flight=most[0],
        max_in_flight_source=sender_pb2.LimitSource.ValueType(most[1]),
        cooldown_end_time=None if cooldown is None else to_timestamp(cooldown.next_probe_at),
        cooldown_cause="" if cooldown is None else cooldown.reply,
        complete=found.complete,
    )


def etag_of(record: SenderRecord) -> str:
    """Return the etag of a sender: every change by a call has a revision of its own."""
    return str(record.revision)


_KEPT_APART: Final = "set"
# Fields that the audit log leaves out: the event has them already, or they follow from other
# fields.
_NOT_AUDITED: Final = (
    *("sender_id", "user_id", "create_time", "update_time", "etag", "cooldown"),
    *("effective_min_gap", "effective_hourly_limit", "binding_limit", "effective_limits"),
)


def audited(sender: sender_pb2.Sender) -> dict[str, Any]:
    """Return the values of a sender for the audit log. Secrets are not in the proto."""
    values: dict[str, Any] = json_format.MessageToDict(sender, preserving_proto_field_name=True)
    for name in _NOT_AUDITED:
        values.pop(name, None)
    certificates = values.get("smtp", {}).pop("ca_certificates", None)
    if certificates:
        values["smtp"]["ca_certificates_set"] = True
    return values


def without_certificates(sender: sender_pb2.Sender) -> sender_pb2.Sender:
    """Return a sender with a mark in place of its CA certificates, which may have 64 KiB."""
    kept = sender_pb2.Sender()
    kept.CopyFrom(sender)
    if kept.smtp.ca_certificates:
        kept.smtp.ca_certificates = _KEPT_APART
    return kept


def _to_hours(hours: SendingHours) -> sender_pb2.SendingHours:
    return sender_pb2.SendingHours(
        weekdays=[sender_pb2.Weekday.ValueType(day) for day in sorted(hours.weekdays)],
        start=_clock(hours.start),
        end=_clock(hours.end),
        time_zone=hours.zone,
    )


def _clock(minutes: int) -> str:
    return f"{minutes // 60:02}:{minutes % 60:02}"


def _to_endpoint(record: SenderRecord) -> sender_pb2.SmtpEndpoint:
    oauth2 = record.oauth2
    return sender_pb2.SmtpEndpoint(
        host=record.smtp_host or "",
        port=record.smtp_port or 0,
        security=_SECURITY.get(
            record.smtp_security or SmtpSecurity.STARTTLS, sender_pb2.SMTP_SECURITY_UNSPECIFIED
        ),
        username=record.smtp_username or "",
        password_set=record.password_set,
        ca_certificates=record.smtp_ca or "",
        oauth2=None if oauth2 is None else sender_pb2.OAuth2Credentials(**asdict(oauth2)),
    )


def to_verification(found: Verification) -> sender_service_pb2.VerifySenderResponse:
    """Return the proto of a verification."""
    probe = found.probe
    failed = probe.failed_phase
    return sender_service_pb2.VerifySenderResponse(
        ready=not probe.failure,
        host=found.host,
        port=found.port,
        tls_version=probe.tls_version,
        extensions=probe.extensions,
        smtp_code=probe.smtp_code,
        failure=probe.failure,
        elapsed=to_duration(probe.elapsed),
        max_message_bytes=probe.max_message_bytes,
        helo_name=probe.helo,
        reply_class=email_job_pb2.ReplyClass.ValueType(probe.reply_class or 0),
        failed_step=(
            sender_service_pb2.SMTP_STEP_UNSPECIFIED if failed is None else _STEPS[failed]
        ),
    )
