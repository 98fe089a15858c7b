"""Sending hours as options of the command line."""

from __future__ import annotations

import pytest
import typer
from outbox.v1.sender_pb2 import SendingHours

from outbox_server.cli.sending_hours import read_hours, to_sending_hours


@pytest.mark.parametrize(
    ("text", "weekdays", "times"),
    [
        ("mon-fri 09:00-17:00", [1, 2, 3, 4, 5], ("09:00", "17:00")),
        ("Fri-Mon 22:00 - 06:00", [1, 5, 6, 7], ("22:00", "06:00")),
        ("mon, wed-thu,thu 09:00-24:00", [1, 3, 4], ("09:00", "24:00")),
        ("sunday 09:00-10:00", [7], ("09:00", "10:00")),
        (" 08:30-20:00 ", [], ("08:30", "20:00")),
    ],
)
def test_days_and_times_are_read(text: str, weekdays: list[int], times: tuple[str, str]) -> None:
    hours = to_sending_hours(read_hours(text), "Europe/Berlin")
    assert isinstance(hours, SendingHours)
    assert list(hours.weekdays) == weekdays
    assert (hours.start, hours.end) == times
    assert hours.time_zone == "Europe/Berlin"


@pytest.mark.parametrize(
    "text", ["", "mon-fri", "9-17", "mon-fry 09:00-17:00", "mon- 09:00-17:00x"]
)
def test_invalid_hours_are_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        read_hours(text)


def test_hours_and_zone_must_be_given_together() -> None:
    assert to_sending_hours(None, None) is None
    for hours, zone in ((read_hours("09:00-17:00"), None), (None, "UTC")):
        with pytest.raises(typer.BadParameter):
            to_sending_hours(hours, zone)
