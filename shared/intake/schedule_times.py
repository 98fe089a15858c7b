"""Converts a row's `schedule_time` and `time_zone` to an instant, or says why it is impossible.

The format is RFC 3339. A blank may replace the `T`, and seconds may be left out. An offset may also
be written as `+0100` or `+01`, as other programs do. A time without an offset is a local time in
`time_zone` (a name of the IANA database), or else in the time zone of the batch, which is UTC by
default.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta, tzinfo
from functools import lru_cache
from zoneinfo import ZoneInfo

from outbox_server.shared.bounds import MAX_TIME, TIME_ZONE
from outbox_server.shared.quoting import quoted

_FORM = re.compile(
    r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d)(:\d\d(?:\.\d{1,9})?)?\s?([Zz]|[+-]\d\d(?::?[0-5]\d)?)?",
    re.ASCII,
)
_EXAMPLE = "write 2026-11-24T09:00:00+01:00, or 2026-11-24 09:00 with a time_zone"
# Files of the database that are not time zones, or that count leap seconds.
_NOT_ZONES = ("posix/", "right/", "posixrules", "localtime", "Factory")
_ZERO = timedelta(0)
_MAX_SHOWN = 40


class BadScheduleTime(ValueError):
    """The texts do not give one instant.

    `column` is `schedule_time` or `time_zone`; `reason` is SCHEDULE_TIME_INVALID,
    UNKNOWN_TIME_ZONE, LOCAL_TIME_DOES_NOT_EXIST or LOCAL_TIME_AMBIGUOUS.
    """

    def __init__(self, column: str, reason: str, message: str) -> None:
        super().__init__(message)
        self.column = column
        self.reason = reason
        self.message = message


def check_time_zone(name: str) -> tzinfo:
    """Return the zone of that name in the IANA database, such as `Europe/Berlin`.

    Raises:
        BadScheduleTime: UNKNOWN_TIME_ZONE.
    """
    # A long text must not get into the cache.
    zone = _zone(name) if len(name) <= TIME_ZONE.most else None
    if zone is None:
        raise BadScheduleTime(
            "time_zone",
            "UNKNOWN_TIME_ZONE",
            f"{_show(name)} is not a time zone; write a name such as Europe/Berlin or UTC",
        )
    return zone


def parse_schedule_time(text: str, zone_name: str = "", default_zone: str = "UTC") -> datetime:
    """Return the instant given by `text`, in UTC.

    If `text` has no offset, it is a local time in `zone_name`, or in `default_zone` if that is
    empty. A local time that the zone's clocks skip or show twice is refused.

    Raises:
        BadScheduleTime: not a time, a date that does not exist, an unknown zone, or a local time
            that does not exist or exists twice.
    """
    text = text.strip()
    match = _FORM.fullmatch(text) if len(text) <= MAX_TIME else None
    if match is None:
        raise _invalid(f"{_show(text)} is not a time; {_EXAMPLE}")
    day, clock, seconds, offset = match.groups()
    # Always checked: a wrong name is a mistake, even if it is not needed.
    zone = check_time_zone(zone_name.strip() or default_zone)
    try:
        date = datetime.fromisoformat(day)
    except ValueError:
        raise _invalid(f"the date {day} does not exist") from None
    try:
        local = datetime.fromisoformat(f"{date.date()}T{clock}{seconds or ':00'}")
        if offset is None:
            return _instant(local, zone, zone_name.strip() or default_zone)
        written = "+00:00" if offset in "Zz" else offset
        return datetime.fromisoformat(f"{local.isoformat()}{written}").astimezone(UTC)
    except BadScheduleTime:
        raise
    except ValueError:
        raise _invalid(
            f"{_show(text)} is out of range: hours must be at most 23, minutes and seconds 59, "
            "offsets 23:59"
        ) from None
    except OverflowError:
        raise _invalid(f"{_show(text)} is outside the years 1 to 9999 in UTC") from None


def _instant(local: datetime, zone: tzinfo, name: str) -> datetime:
    """Return the one instant at which clocks in `zone` show `local`.

    The two readings of a local time (`fold`, PEP 495) differ only at a change of the clocks. In a
    skipped hour the first reading has the smaller offset, in a repeated hour the larger.
    """
    first = local.replace(tzinfo=zone, fold=0)
    second = local.replace(tzinfo=zone, fold=1)
    offset, later_offset = first.utcoffset() or _ZERO, second.utcoffset() or _ZERO
    if offset < later_offset:
        raise BadScheduleTime(
            "schedule_time",
            "LOCAL_TIME_DOES_NOT_EXIST",
            f"{local.isoformat(' ')} does not exist in {name}: the clocks go from UTC"
            f"{_format(offset)} to UTC{_format(later_offset)} and skip it; choose another time, "
            "or write the offset",
        )
    if offset > later_offset:
        raise BadScheduleTime(
            "schedule_time",
            "LOCAL_TIME_AMBIGUOUS",
            f"{local.isoformat(' ')} exists twice in {name}, at UTC{_format(offset)} and at UTC"
            f"{_format(later_offset)}: write the offset, as in "
            f"{local.isoformat()}{_format(offset)}",
        )
    return first.astimezone(UTC)


@lru_cache(maxsize=1024)
def _zone(name: str) -> tzinfo | None:
    """Return the zone, or None if there is none. Cached, because rows repeat the same name."""
    if name.startswith(_NOT_ZONES):
        return None
    try:
        return ZoneInfo(name)
    # It may also be a folder, a file that is not a zone, or a name that contains `..`.
    except (KeyError, ValueError, OSError):
        return None


def _format(offset: timedelta) -> str:
    minutes = round(offset / timedelta(minutes=1))
    sign = "-" if minutes < 0 else "+"
    return f"{sign}{abs(minutes) // 60:02}:{abs(minutes) % 60:02}"


def _invalid(message: str) -> BadScheduleTime:
    return BadScheduleTime("schedule_time", "SCHEDULE_TIME_INVALID", message)


def _show(text: str) -> str:
    return quoted(text, _MAX_SHOWN)
