"""A row's `schedule_time` and `timezone` become one instant, or a reason why they cannot.

RFC 3339, with a blank in place of the `T` and without seconds if one likes. With an offset it is an
instant. Without one it is a local time of `timezone` (a name of the IANA database), or of the
batch's zone, which is UTC unless the caller says otherwise.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta, tzinfo
from functools import lru_cache
from zoneinfo import ZoneInfo

_FORM = re.compile(
    r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d)(:\d\d(?:\.\d{1,9})?)?\s?([Zz]|[+-]\d\d:\d\d)?", re.ASCII
)
_EXAMPLE = "write 2026-11-24T09:00:00+01:00, or 2026-11-24 09:00 with a timezone"
# Copies of the database that count leap seconds or are no places.
_NO_ZONES = ("posix/", "right/", "posixrules", "localtime", "Factory")
_ZERO = timedelta(0)
_SHOWN = 40


class BadScheduleTime(ValueError):
    """No instant.

    `column` is `schedule_time` or `timezone`; `reason` is SCHEDULE_TIME_INVALID, UNKNOWN_TIME_ZONE,
    LOCAL_TIME_DOES_NOT_EXIST or LOCAL_TIME_AMBIGUOUS.
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
    zone = _zone(name)
    if zone is None:
        raise BadScheduleTime(
            "timezone",
            "UNKNOWN_TIME_ZONE",
            f"{_show(name)} is no time zone; write a name such as Europe/Berlin or UTC",
        )
    return zone


def parse_schedule_time(text: str, zone_name: str = "", default_zone: str = "UTC") -> datetime:
    """Return the instant that `text` says, in UTC.

    Without an offset in `text` it is a local time of `zone_name`, or where that is empty of
    `default_zone`. A local time that the zone's clocks skip or show twice is refused: write the
    offset.

    Raises:
        BadScheduleTime: no time, a date that does not exist, an unknown zone, no one instant.
    """
    text = text.strip()
    match = _FORM.fullmatch(text)
    if match is None:
        raise _invalid(f"{_show(text)} is no time; {_EXAMPLE}")
    day, clock, seconds, offset = match.groups()
    # Always looked at: a wrong name is a mistake, whether it is needed or not.
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
            f"{_show(text)}: hours go to 23, minutes and seconds to 59, offsets to 23:59"
        ) from None
    except OverflowError:
        raise _invalid(f"{_show(text)} is out of the calendar") from None


def _instant(local: datetime, zone: tzinfo, name: str) -> datetime:
    """Return the one instant at which clocks in `zone` show `local`.

    The two readings of a local time (`fold`, PEP 495) differ at a change of the clocks only: in a
    gap the first has the smaller offset, in an hour that comes twice the larger.
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
    """Return the zone, None if there is none; remembers both, since rows repeat the same name."""
    if name.startswith(_NO_ZONES):
        return None
    try:
        return ZoneInfo(name)
    # A folder, a file that is no zone, a name with `..` in it: all no zones.
    except (KeyError, ValueError, OSError):
        return None


def _format(offset: timedelta) -> str:
    minutes = round(offset / timedelta(minutes=1))
    sign = "-" if minutes < 0 else "+"
    return f"{sign}{abs(minutes) // 60:02}:{abs(minutes) % 60:02}"


def _invalid(message: str) -> BadScheduleTime:
    return BadScheduleTime("schedule_time", "SCHEDULE_TIME_INVALID", message)


def _show(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")
