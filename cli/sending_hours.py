"""Sending hours as the command line writes them: `mon-fri 09:00-17:00`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Final

import typer
from outbox.v1.sender_pb2 import SendingHours, Weekday

_DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_WRITTEN: Final = re.compile(r"(?:([A-Za-z, -]+) )?(\d\d:\d\d) ?- ?(\d\d:\d\d)", re.ASCII)


@dataclass(frozen=True, slots=True)
class WrittenHours:
    """Sending hours without their zone; no days: every day."""

    weekdays: tuple[int, ...]
    start: str
    end: str


def read_hours(text: str) -> WrittenHours:
    """Return the hours of an option; whether the times are any is the server's to say.

    Raises:
        typer.BadParameter: the text is none.
    """
    match = _WRITTEN.fullmatch(text.strip())
    if match is None:
        raise typer.BadParameter(
            f"{text!r}: write 'mon-fri 09:00-17:00', 'mon,wed 22:00-06:00' or '08:00-20:00'"
        )
    days = [] if match[1] is None else sorted(set(_read_days(match[1])))
    return WrittenHours(tuple(days), match[2], match[3])


HoursOption = Annotated[
    WrittenHours | None,
    typer.Option(
        "--sending-hours",
        parser=read_hours,
        metavar="'[DAYS] HH:MM-HH:MM'",
        help="When it may send, such as 'mon-fri 09:00-17:00'; needs --sending-zone.",
    ),
]
ZoneOption = Annotated[
    str | None,
    typer.Option(
        "--sending-zone", metavar="ZONE", help="Whose clocks those are, such as Europe/Berlin."
    ),
]


def to_sending_hours(hours: WrittenHours | None, zone: str | None) -> SendingHours | None:
    """Return a message field; None: unset.

    Raises:
        typer.BadParameter: only one of them was given.
    """
    if hours is None and zone is None:
        return None
    if hours is None or not zone:
        raise typer.BadParameter("sending hours are written whole: --sending-hours, --sending-zone")
    weekdays = [Weekday.ValueType(day) for day in hours.weekdays]
    return SendingHours(weekdays=weekdays, start=hours.start, end=hours.end, time_zone=zone)


def _read_days(text: str) -> Iterator[int]:
    """Yield weekdays from 1, Monday; `fri-mon` goes over the end of the week."""
    for part in text.lower().split(","):
        first, _, last = (name.strip()[:3] for name in part.partition("-"))
        if first not in _DAYS or (last or first) not in _DAYS:
            raise typer.BadParameter(f"{part.strip()!r} is none of {', '.join(_DAYS)}")
        begin = _DAYS.index(first)
        for step in range((_DAYS.index(last or first) - begin) % 7 + 1):
            yield (begin + step) % 7 + 1
