"""The options for sending hours, such as `mon-fri 09:00-17:00`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Final

import typer
from outbox.v1.sender_pb2 import SendingHours, Weekday

_DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_HOURS_PATTERN: Final = re.compile(r"(?:([A-Za-z, -]+) )?(\d\d:\d\d) ?- ?(\d\d:\d\d)", re.ASCII)


@dataclass(frozen=True, slots=True)
class HoursWithoutZone:
    """Sending hours without their time zone. No weekdays means every day."""

    weekdays: tuple[int, ...]
    start: str
    end: str


def read_hours(text: str) -> HoursWithoutZone:
    """Parse the sending hours of an option. The server checks the times.

    Raises:
        typer.BadParameter: the text has another form.
    """
    match = _HOURS_PATTERN.fullmatch(text.strip())
    if match is None:
        raise typer.BadParameter(
            f"{text!r} is not '[DAYS] HH:MM-HH:MM': for example 'mon-fri 09:00-17:00', "
            "'mon,wed 22:00-06:00' or '08:00-20:00'"
        )
    days = [] if match[1] is None else sorted(set(_read_days(match[1])))
    return HoursWithoutZone(tuple(days), match[2], match[3])


HoursOption = Annotated[
    HoursWithoutZone | None,
    typer.Option(
        "--sending-hours",
        parser=read_hours,
        metavar="'[DAYS] HH:MM-HH:MM'",
        help="Hours for sending, such as 'mon-fri 09:00-17:00'; needs --sending-zone.",
    ),
]
ZoneOption = Annotated[
    str | None,
    typer.Option(
        "--sending-zone",
        metavar="ZONE",
        help="Time zone of --sending-hours, such as Europe/Berlin.",
    ),
]


def to_sending_hours(hours: HoursWithoutZone | None, zone: str | None) -> SendingHours | None:
    """Convert the two options to a message field. None means unset.

    Raises:
        typer.BadParameter: only one of the two was given.
    """
    if hours is None and zone is None:
        return None
    if hours is None or not zone:
        raise typer.BadParameter("give --sending-hours and --sending-zone together")
    weekdays = [Weekday.ValueType(day) for day in hours.weekdays]
    return SendingHours(weekdays=weekdays, start=hours.start, end=hours.end, time_zone=zone)


def _read_days(text: str) -> Iterator[int]:
    """Yield weekdays as numbers from 1 (Monday). `fri-mon` wraps around the week."""
    for part in text.lower().split(","):
        first, _, last = (name.strip()[:3] for name in part.partition("-"))
        if first not in _DAYS or (last or first) not in _DAYS:
            raise typer.BadParameter(f"{part.strip()!r} is not one of {', '.join(_DAYS)}")
        begin = _DAYS.index(first)
        for step in range((_DAYS.index(last or first) - begin) % 7 + 1):
            yield (begin + step) % 7 + 1
