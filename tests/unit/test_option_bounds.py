"""Numbers and times as options that no field of a message can hold."""

from __future__ import annotations

import pytest
import typer
from typer.testing import CliRunner

from outbox_server.cli.options import read_duration, read_time
from outbox_server.cli.senders import app as senders
from outbox_server.cli.stats import app as stats


@pytest.mark.parametrize(
    "text",
    [
        "in 99999999h",
        "in 99999999999999999h",
        "9999-12-31T23:59:59-05:00",
        "0001-01-01T00:00:00+05:00",
    ],
)
def test_a_time_outside_the_calendar_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        read_time(text)


def test_an_overflowing_duration_is_refused() -> None:
    with pytest.raises(typer.BadParameter, match="must be at most"):
        read_duration("99999999999999h")


@pytest.mark.parametrize(
    ("app", "arguments"),
    [
        (senders, ["create", "--email", "a@example.com", "--hourly-limit", "99999999999"]),
        (senders, ["update", "1", "--max-in-flight", "99999999999"]),
        (senders, ["create", "--email", "a@example.com", "--smtp-port", "99999999999"]),
        (stats, ["forecast", "--sender", "1", "--recipient-count", "9" * 20]),
    ],
)
def test_a_number_too_large_for_its_field_is_wrong_usage(
    app: typer.Typer, arguments: list[str]
) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "too large" in result.output
