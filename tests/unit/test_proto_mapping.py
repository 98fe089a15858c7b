from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from outbox.v1.email_job_pb2 import EmailJobCounts

from outbox_server.shared.database.counts import JobCounts
from outbox_server.shared.errors import InvalidInput, NotFound
from outbox_server.shared.rpc.proto_mapping import (
    from_duration,
    from_timestamp,
    id_text,
    parse_id,
    to_duration,
    to_job_counts,
    to_timestamp,
)
from outbox_server.shared.states import JobState


@pytest.mark.parametrize("number", [1, 10, 2**63 - 1])
def test_an_id_round_trips(number: int) -> None:
    assert parse_id(id_text(number), "batch_id") == number


# The last but one is 2^63; the last is the digit one of another script, which int() would accept.
@pytest.mark.parametrize(
    "text", ["x", "0", "01", "-1", "+1", " 1", "1 ", "1\n", "1_0", str(2**63), "\u0661"]
)
def test_a_malformed_id_is_not_found(text: str) -> None:
    with pytest.raises(NotFound) as caught:
        parse_id(text, "email_job_id")
    assert caught.value.reason == "EMAIL_JOB_NOT_FOUND"
    assert caught.value.metadata == {"email_job_id": text}
    assert caught.value.message.startswith("there is no e-mail job ")


def test_an_empty_id_is_invalid_and_names_its_field() -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_id("", "sender.sender_id")
    assert caught.value.reason == "SENDER_ID_REQUIRED"
    assert [violation.field for violation in caught.value.violations] == ["sender.sender_id"]


def test_a_time_round_trips_in_utc_to_the_microsecond() -> None:
    time = datetime(2026, 2, 3, 4, 5, 6, 789012, tzinfo=timezone(timedelta(hours=-5)))
    back = from_timestamp(to_timestamp(time), "start_time")
    assert back == time
    assert back.tzinfo is UTC


@pytest.mark.parametrize(
    "stamp",
    [
        Timestamp(seconds=253_402_300_800),
        Timestamp(seconds=-62_135_596_801),
        Timestamp(nanos=-1),
        Timestamp(nanos=1_000_000_000),
    ],
)
def test_an_out_of_range_timestamp_is_invalid(stamp: Timestamp) -> None:
    with pytest.raises(InvalidInput, match="start_time: must be from 0001"):
        from_timestamp(stamp, "start_time")


@pytest.mark.parametrize("span", [timedelta(0), timedelta(microseconds=1), timedelta(days=-1.5)])
def test_a_duration_round_trips(span: timedelta) -> None:
    assert from_duration(to_duration(span), "spacing") == span


@pytest.mark.parametrize(
    "duration",
    [
        Duration(seconds=315_576_000_001),
        Duration(seconds=1, nanos=-1),
        Duration(nanos=1_000_000_000),
    ],
)
def test_an_out_of_range_duration_is_invalid(duration: Duration) -> None:
    with pytest.raises(InvalidInput, match="spacing: must be within"):
        from_duration(duration, "spacing")


def test_every_state_has_a_count_in_the_proto() -> None:
    counts = JobCounts(*range(1, len(JobState) + 1))
    proto = to_job_counts(counts)
    assert len(EmailJobCounts.DESCRIPTOR.fields) == len(JobState)
    for state in JobState:
        assert getattr(proto, f"{state.name.lower()}_count") == counts[state] == state
