"""Values in tables, and errors in one line, for people to read."""

from __future__ import annotations

from datetime import timedelta

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from outbox.v1.batch_pb2 import Batch, MailHeader
from outbox.v1.dispatcher_pb2 import DispatcherStatus
from outbox.v1.email_job_pb2 import REPLY_CLASS_SENT
from outbox.v1.sender_pb2 import Cooldown, Sender
from outbox.v1.stats_pb2 import EndpointStats, ReplyClassCount
from outbox_client import InvalidArgument
from outbox_client.errors import FieldViolation
from typer.testing import CliRunner

from outbox_server.cli.output import OutputFormat, show, value_at
from outbox_server.cli.stats import app as stats
from outbox_server.shared.durations import parse_duration

WRONG = grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("time", "text"),
    [
        (timedelta(milliseconds=250), "250ms"),
        (timedelta(milliseconds=1_500), "1.5s"),
        (timedelta(seconds=2), "2s"),
        (timedelta(minutes=1), "1m"),
        (timedelta(milliseconds=1_998_129), "33m18s"),
        (timedelta(hours=30, seconds=7), "30h7s"),
    ],
)
def test_a_duration_is_short_and_round_trips(time: timedelta, text: str) -> None:
    uptime = Duration()
    uptime.FromTimedelta(time)
    assert value_at(DispatcherStatus(uptime=uptime), "uptime") == text
    assert abs(parse_duration(text) - time) < timedelta(seconds=1)


@pytest.mark.parametrize(
    ("rate", "text"), [(0.16666666666666666, "0.167"), (12.345, "12.3"), (1234.5678, "1235")]
)
def test_a_rate_has_three_digits(rate: float, text: str) -> None:
    status = DispatcherStatus()
    status.rates.sent_per_second = rate
    assert value_at(status, "rates.sent_per_second") == text


def test_a_map_and_a_list_of_pairs_are_shown_with_their_values() -> None:
    batch = Batch(
        labels={"region": "north", "campaign": "spring"},
        headers=[MailHeader(name="X-A", value="1"), MailHeader(name="X-B", value="2")],
    )
    assert value_at(batch, "labels") == "campaign=spring, region=north"
    assert value_at(batch, "headers") == "X-A: 1, X-B: 2"
    replies = [
        ReplyClassCount(count=2),
        ReplyClassCount(reply_class=REPLY_CLASS_SENT, count=10),
    ]
    assert value_at(EndpointStats(replies=replies), "replies") == "no reply=2, SENT=10"


def test_a_cooldown_is_one_cell_without_terminal_escapes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    cooldown = Cooldown(
        start_time=Timestamp(seconds=1_795_860_120),
        next_probe_time=Timestamp(seconds=1_795_863_720),
        refusal_count=2,
        smtp_code=550,
        enhanced_code="5.4.5",
        message="5.4.5 Daily limit\r\n\x1b[31mexceeded",
    )
    shown = (
        "since 2026-11-28T10:02:00Z: 550 5.4.5 Daily limit \\x1b[31mexceeded; "
        "next probe 2026-11-28T11:02:00Z"
    )
    sender = Sender(sender_id="3", cooldown=cooldown)
    assert value_at(sender, "cooldown") == shown
    show(sender, OutputFormat.TABLE)
    out = capsys.readouterr().out
    assert shown in out
    assert "cooldown.message" not in out


def test_an_error_is_not_repeated() -> None:
    empty = "the CSV is empty"
    one = InvalidArgument(WRONG, empty, violations=(FieldViolation("chunk", empty),))
    assert str(one).count(empty) == 1
    other = (FieldViolation("name", "is missing"),)
    two = InvalidArgument(WRONG, "email: is missing", violations=other)
    assert str(two).endswith("; name: is missing")


def test_a_forecast_takes_a_batch_or_a_plan_but_not_both() -> None:
    result = CliRunner().invoke(
        stats, ["forecast", "17", "--spacing", "5s", "--schedule-time", "now"]
    )
    assert result.exit_code == 2
    assert "--schedule-time, --spacing: only for a planned batch" in " ".join(result.output.split())
