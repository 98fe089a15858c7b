"""Checks the fields of a sender and fills in defaults. Pure."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from datetime import timedelta
from typing import Final

from outbox_server.shared import bounds
from outbox_server.shared.durations import format_duration
from outbox_server.shared.errors import InvalidInput, Violations
from outbox_server.shared.intake.addresses import BadAddress, check_address
from outbox_server.shared.intake.schedule_times import BadScheduleTime, check_time_zone
from outbox_server.shared.sending_hours import SendingHours
from outbox_server.shared.smtp.endpoint import Endpoint
from outbox_server.shared.states import SmtpSecurity, requested_enum
from outbox_server.shared.tls import check_ca

_MILLISECOND: Final = timedelta(milliseconds=1)
_TLS_PORT: Final = 465
_SUBMISSION_PORT: Final = 587
# Underscores are accepted, because names of containers may contain them.
_LABEL: Final = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_CLOCK: Final = re.compile(r"([01][0-9]|2[0-3]|24(?=:00))(?::)([0-5][0-9])", re.ASCII)
_DAY_MINUTES: Final = 24 * 60
_HOST_NAME: Final = re.compile(rf"{_LABEL}(?:\.{_LABEL})*\.?")


def check_sender_address(field: str, text: str, *, special_domains: bool = True) -> str:
    """Return the address in the form that is used for sending.

    Without `special_domains`, domains of private networks are refused.

    Raises:
        InvalidInput: ADDRESS_INVALID.
    """
    try:
        return check_address(text, special_domains=special_domains)
    except BadAddress as error:
        raise InvalidInput.field(field, error.message, reason="ADDRESS_INVALID") from None


def check_hourly_limit(field: str, limit: int | None, default: int) -> int:
    """Return the limit. None means the operator's default.

    Raises:
        InvalidInput: HOURLY_LIMIT_INVALID.
    """
    if limit is None:
        return default
    if not 1 <= limit <= bounds.MAX_HOURLY_LIMIT:
        raise InvalidInput.field(
            field,
            f"must be 1 to {bounds.MAX_HOURLY_LIMIT:,} (got {limit:,}); "
            "to send nothing, pause the sender",
            reason="HOURLY_LIMIT_INVALID",
        )
    return limit


def check_min_gap(field: str, gap_ms: int | None, floor: timedelta) -> int | None:
    """Return the gap in ms. None means the operator's floor, even after the floor changes.

    Raises:
        InvalidInput: GAP_BELOW_FLOOR, with gap and floor in its metadata; MIN_GAP_INVALID: the gap
            is longer than a day.
    """
    if gap_ms is None:
        return None
    if gap_ms > bounds.MAX_GAP // _MILLISECOND:
        raise InvalidInput.field(
            field,
            f"must be at most 1 day (got {format_duration(gap_ms * _MILLISECOND)})",
            reason="MIN_GAP_INVALID",
        )
    if gap_ms * _MILLISECOND < floor:
        lowest = format_duration(floor)
        asked = f"-{format_duration(-gap_ms * _MILLISECOND)}" if gap_ms < 0 else ""
        asked = asked or format_duration(gap_ms * _MILLISECOND)
        raise InvalidInput.field(
            field,
            f"must be at least {lowest}, the operator's OUTBOX_MIN_GAP (got {asked})",
            reason="GAP_BELOW_FLOOR",
            metadata={"min_gap": asked, "floor": lowest},
        )
    return gap_ms


def check_max_in_flight(field: str, most: int | None) -> int:
    """Return how many sends may be in flight at once. None means 5.

    Raises:
        InvalidInput: MAX_IN_FLIGHT_INVALID.
    """
    if most is None:
        return bounds.DEFAULT_MAX_IN_FLIGHT
    if not 1 <= most <= bounds.MAX_IN_FLIGHT:
        raise InvalidInput.field(
            field,
            f"must be 1 to {bounds.MAX_IN_FLIGHT:,} (got {most:,})",
            reason="MAX_IN_FLIGHT_INVALID",
        )
    return most


def check_sending_hours(
    field: str, weekdays: Iterable[int], start: str, end: str, time_zone: str
) -> SendingHours:
    """Return the sending hours. An `end` that is not later than `start` is on the next day.

    Raises:
        InvalidInput: SENDING_HOURS_INVALID, UNKNOWN_TIME_ZONE.
    """
    days = frozenset(weekdays)
    wrong = Violations()
    with wrong:
        if not days <= set(range(1, 8)):
            raise InvalidInput.field(
                f"{field}.weekdays",
                "must be WEEKDAY_MONDAY to WEEKDAY_SUNDAY",
                reason="SENDING_HOURS_INVALID",
            )
    with wrong:
        bounds.TIME_ZONE.check(f"{field}.time_zone", time_zone)
        try:
            check_time_zone(time_zone)
        except BadScheduleTime as error:
            raise InvalidInput.field(
                f"{field}.time_zone", error.message, reason="UNKNOWN_TIME_ZONE"
            ) from None
    begins = wrong.value(lambda: _minutes(f"{field}.start", start), 0)
    ends = wrong.value(lambda: _minutes(f"{field}.end", end), 0)
    wrong.raise_any()
    if begins in (ends, _DAY_MINUTES):
        raise InvalidInput.field(
            f"{field}.end",
            "must differ from `start`, which must be before 24:00; for the whole day use 00:00 to "
            "24:00",
            reason="SENDING_HOURS_INVALID",
        )
    return SendingHours(days, begins, ends, time_zone)


def _minutes(field: str, text: str) -> int:
    match = _CLOCK.fullmatch(text)
    if match is None:
        raise InvalidInput.field(
            field,
            f"must be a time of day from 00:00 to 24:00, such as 08:30 (got {text[:20]!r})",
            reason="SENDING_HOURS_INVALID",
        )
    return int(match[1]) * 60 + int(match[2])


def check_endpoint(
    field: str, host: str, port: int, *, security: int, username: str, password: str, ca: str
) -> Endpoint:
    """Return the endpoint. The usual port and security replace a 0.

    Raises:
        InvalidInput: SMTP_ENDPOINT_INVALID.
    """
    wrong = Violations()
    with wrong:
        check_host(f"{field}.host", host)
    with wrong:
        if not 0 <= port <= bounds.MAX_PORT:
            raise _invalid(f"{field}.port", f"must be 1 to {bounds.MAX_PORT} (got {port})")
    chosen = wrong.value(
        lambda: requested_enum(
            SmtpSecurity, security, f"{field}.security", reason="SMTP_ENDPOINT_INVALID"
        ),
        None,
    )
    if chosen is None:
        chosen = SmtpSecurity.TLS if port == _TLS_PORT else SmtpSecurity.STARTTLS
    if not port:
        port = _TLS_PORT if chosen is SmtpSecurity.TLS else _SUBMISSION_PORT
    with wrong:
        bounds.SMTP_USERNAME.check(f"{field}.username", username)
        if password and not username:
            raise _invalid(f"{field}.username", "must be set if `password` is set")
    with wrong:
        bounds.SMTP_PASSWORD.check(f"{field}.password", password)
    with wrong:
        if password and chosen is SmtpSecurity.NONE:
            raise _invalid(f"{field}.security", "must be STARTTLS or TLS if `password` is set")
    if ca:
        with wrong:
            try:
                check_ca(ca)
            except ValueError as error:
                raise _invalid(f"{field}.ca_certificates", str(error)) from None
    wrong.raise_any()
    return Endpoint(host, port, chosen, username, password, ca=ca)


def check_host(field: str, host: str) -> None:
    """Check that `host` is a host name or an IP address.

    Raises:
        InvalidInput: SMTP_ENDPOINT_INVALID.
    """
    bounds.SMTP_HOST.check(field, host)
    if _HOST_NAME.fullmatch(host):
        return
    try:
        ipaddress.ip_address(host)
    except ValueError:
        raise _invalid(
            field, f"{host!r} is not a host name or an IP address; a port belongs in `port`"
        ) from None


def _invalid(field: str, description: str) -> InvalidInput:
    return InvalidInput.field(field, description, reason="SMTP_ENDPOINT_INVALID")
