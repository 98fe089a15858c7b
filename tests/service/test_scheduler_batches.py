"""BatchService, over a real channel, on real stores."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest_asyncio
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from outbox.v1 import batch_pb2, sender_pb2
from outbox.v1.batch_service_pb2 import (
    CancelBatchRequest,
    GetBatchRequest,
    ListBatchesRequest,
    ListRejectionsRequest,
    ScheduleBatchRequest,
    ScheduleBatchResponse,
    UploadBatchRequest,
)
from outbox.v1.sender_service_pb2 import PauseSenderRequest

from outbox_server.shared.states import JobState
from tests.eventually import eventually
from tests.for_each import for_each_case
from tests.scheduler_stack import Scheduler, options_for, refusal_of, running_scheduler

STRICT = batch_pb2.BATCH_MODE_STRICT
KEEP_ALL = batch_pb2.DUPLICATE_POLICY_KEEP_ALL
# The rows of a batch; the others change when heads are loaded and counts are folded.
OF_BATCHES = ("batches", "batch_rejections", "email_jobs")
TABLES = (*OF_BATCHES, "count_deltas", "head_markers")


@pytest_asyncio.fixture
async def scheduler(database_url: str, redis_url: str) -> AsyncIterator[Scheduler]:
    async with running_scheduler(database_url, redis_url, max_message_bytes=4096) as running:
        yield running


@pytest_asyncio.fixture
async def sender(scheduler: Scheduler) -> sender_pb2.Sender:
    return await scheduler.sender()


def stored_rows(scheduler: Scheduler, tables: Iterable[str]) -> list[int]:
    return [scheduler.value(f"SELECT count(*) FROM {table}") for table in tables]


def nothing_is_stored(scheduler: Scheduler) -> bool:
    return not any(stored_rows(scheduler, TABLES))


async def upload(
    scheduler: Scheduler, options: batch_pb2.BatchOptions, chunks: Iterable[bytes]
) -> ScheduleBatchResponse:
    async def messages() -> AsyncIterator[UploadBatchRequest]:
        yield UploadBatchRequest(options=options)
        for chunk in chunks:
            yield UploadBatchRequest(chunk=chunk)

    return await scheduler.batches.UploadBatch(messages())


def timestamp(time: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(time)
    return stamp


# Accepted batches


async def test_a_csv_becomes_jobs_that_store_only_the_used_columns(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    csv = 'E-Mail;First Name;Unused\nann@b.org;"Ann ""\\"" Lee";x\nBOB@B.org;Bob\tR;y\n'
    answer = await scheduler.schedule(
        sender, csv, subject="Hi {{ first_name }}", body="To {{ email }}"
    )
    batch = answer.batch
    assert (batch.accepted_count, batch.rejected_count) == (2, 0)
    assert batch.counts.scheduled_count == 2
    assert batch.state == batch_pb2.BATCH_STATE_ACTIVE
    assert (batch.subject, batch.body, batch.HasField("html")) == (
        "Hi {{ first_name }}",
        "To {{ email }}",
        False,
    )
    assert scheduler.value("SELECT variable_names FROM batches") == ["email", "first_name"]
    stored = scheduler.rows("SELECT recipient, variables, row_number FROM email_jobs ORDER BY id")
    assert [
        (recipient, json.loads(variables), number) for recipient, variables, number in stored
    ] == [
        ("ann@b.org", ["ann@b.org", 'Ann "\\" Lee'], 1),
        ("BOB@b.org", ["BOB@B.org", "Bob\tR"], 2),
    ]
    deltas = scheduler.rows("SELECT sender_id, batch_id, state, n FROM count_deltas")
    assert deltas == [(int(sender.sender_id), int(batch.batch_id), 1, 2)]
    # The head was loaded. Its marker is deleted afterwards.
    await eventually(lambda: scheduler.value("SELECT count(*) = 0 FROM head_markers"))


async def test_inline_rows_become_jobs(scheduler: Scheduler, sender: sender_pb2.Sender) -> None:
    recipients = batch_pb2.Recipients(
        rows=[
            batch_pb2.Recipient(email="ann@b.org", columns={"First Name": "Ann"}),
            batch_pb2.Recipient(email="bob@b.org", columns={"other": "x"}),
            batch_pb2.Recipient(email="cid@b.org", columns={"first_name": "Cid", "to": "x@y.org"}),
        ]
    )
    answer = await scheduler.batches.ScheduleBatch(
        ScheduleBatchRequest(
            options=options_for(sender, subject="Hi {{ first_name }}"), recipients=recipients
        )
    )
    assert (answer.batch.accepted_count, answer.batch.rejected_count) == (1, 2)
    assert [(row.row_number, row.column, row.reason) for row in answer.rejections] == [
        (2, "first_name", "COLUMN_MISSING"),
        (3, "to", "DUPLICATE_COLUMN"),
    ]


async def test_an_upload_in_single_bytes_gives_the_same_batch(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    csv = "email,name\nann@b.org,Zoë\nbob@b.org,李\n"
    options = options_for(sender, subject="Hi {{ name }}")
    chunks = [csv.encode()[i : i + 1] for i in range(len(csv.encode()))]
    first = await upload(scheduler, options, chunks)
    assert first.batch.accepted_count == 2
    again = await scheduler.batches.ScheduleBatch(
        ScheduleBatchRequest(options=options, csv=csv.encode())
    )
    assert (again.replayed, again.batch.batch_id) == (True, first.batch.batch_id)


async def test_a_mail_is_due_by_its_place_in_the_batch_or_its_own_time(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    start = datetime.now(UTC).replace(microsecond=0) + timedelta(days=1)
    csv = "email,schedule_time\na@b.org,\nb@b.org,2099-01-01 00:00\nbad,\nc@b.org,\n"
    csv += "d@b.org,2001-01-01 00:00\n"
    answer = await scheduler.schedule(
        sender,
        csv,
        schedule_time=timestamp(start),
        spacing=Duration(seconds=90),
        time_zone="Europe/Berlin",
    )
    assert answer.batch.schedule_time.ToDatetime(UTC) == start
    assert answer.batch.spacing.ToTimedelta() == timedelta(seconds=90)
    due = dict(scheduler.rows("SELECT recipient, scheduled_at FROM email_jobs"))
    assert due["a@b.org"] == start
    assert due["b@b.org"] == datetime(2098, 12, 31, 23, tzinfo=UTC)
    # Rejected rows take no position; rows with their own time do.
    assert due["c@b.org"] == start + 2 * timedelta(seconds=90)
    # The time is in the past: the mail is due at once, but not before mail that already waits.
    assert due["d@b.org"] == answer.batch.create_time.ToDatetime(UTC)


async def test_a_start_in_the_past_means_now(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    answer = await scheduler.schedule(
        sender, schedule_time=timestamp(datetime(2001, 1, 1, tzinfo=UTC))
    )
    assert answer.batch.schedule_time == answer.batch.create_time


async def test_duplicates_and_suppressed_addresses_are_counted_but_not_rejected(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    for user_id, address in (("ann", "bob@b.org"), ("bob", "cid@b.org")):
        scheduler.execute(
            "INSERT INTO suppressions (user_id, address) VALUES (%s, %s)", user_id, address
        )
    csv = "email\nann@b.org\nANN@B.ORG\nBob@b.org\ncid@b.org\n"
    answer = await scheduler.schedule(sender, csv, mode=STRICT)
    batch = answer.batch
    assert (batch.accepted_count, batch.duplicate_count, batch.suppressed_count) == (2, 1, 1)
    assert batch.rejected_count == 0
    all_of_them = await scheduler.schedule(sender, csv, duplicates=KEEP_ALL)
    assert (all_of_them.batch.accepted_count, all_of_them.batch.duplicate_count) == (3, 0)


async def test_a_batch_whose_rows_are_all_suppressed_is_done(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    scheduler.execute("INSERT INTO suppressions (user_id, address) VALUES ('ann', 'a@b.org')")
    answer = await scheduler.schedule(sender)
    assert answer.batch.suppressed_count == 1
    assert answer.batch.state == batch_pb2.BATCH_STATE_DONE
    assert not answer.HasField("forecast_end_time")


async def test_a_cell_of_200_kb_is_accepted(database_url: str, redis_url: str) -> None:
    async with running_scheduler(database_url, redis_url) as scheduler:
        sender = await scheduler.sender()
        csv = f"email,story\na@b.org,{'x' * 200_000}\n"
        answer = await scheduler.schedule(sender, csv, body="{{ story }}", mode=STRICT)
        assert answer.batch.accepted_count == 1


async def test_the_answer_has_the_time_of_the_last_mail_and_the_limit_that_binds(
    scheduler: Scheduler,
) -> None:
    sender = await scheduler.sender(hourly_limit=5_000)
    csv = "email\n" + "".join(f"u{i}@b.org\n" for i in range(31))
    answer = await scheduler.schedule(sender, csv)
    took = answer.forecast_end_time.ToDatetime(UTC) - answer.batch.create_time.ToDatetime(UTC)
    assert timedelta(seconds=60) <= took < timedelta(seconds=70)
    (notice,) = answer.notices
    assert "The gap of 2s binds" in notice
    assert "1800" in notice
    # The second batch waits for the first one.
    second = await scheduler.schedule(sender, csv)
    took = second.forecast_end_time.ToDatetime(UTC) - second.batch.create_time.ToDatetime(UTC)
    assert took >= timedelta(seconds=122)


async def test_a_batch_of_a_paused_sender_is_accepted_and_the_answer_says_it_is_paused(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    await scheduler.senders.PauseSender(PauseSenderRequest(sender_id=sender.sender_id))
    answer = await scheduler.schedule(sender)
    assert any("paused" in notice for notice in answer.notices)
    assert not answer.HasField("forecast_end_time")


# Refused batches


CSV = "email,name,schedule_time,time_zone\n"


@for_each_case(
    "csv reason reported",
    [
        (b"", "CSV_EMPTY", ""),
        (b"\n \n", "CSV_EMPTY", ""),
        (b"email,name\n", "CSV_NO_ROWS", ""),
        (b"Name;Mail address\nAnn;a@b.org\n", "CSV_NO_EMAIL_COLUMN", "'Name', 'Mail address'"),
        (b"email,html,HTML\na@b.org,x,y\n", "CSV_DUPLICATE_COLUMN", "html"),
        (
            b"email,schedule_time,Timezone,time_zone\na@b.org,,UTC,UTC\n",
            "CSV_DUPLICATE_COLUMN",
            "time zone",
        ),
        (b"email,name\na@b.org,Zo\xeb\n", "CSV_NOT_UTF8", "byte 21"),
        (b"email,name\na@b.org,A\0nn\n", "CSV_NUL", "byte 20"),
        (b'email,name\na@b.org,"Ann\n', "CSV_UNCLOSED_QUOTE", "row 1"),
    ],
)
async def test_a_file_that_is_not_csv_is_refused_and_nothing_is_stored(
    scheduler: Scheduler, sender: sender_pb2.Sender, csv: bytes, reason: str, reported: str
) -> None:
    streamed = upload(scheduler, options_for(sender), [csv] if csv else [])
    for call in (scheduler.schedule(sender, csv), streamed):
        refusal = await refusal_of(call)
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", reason)
        assert reported in refusal.message
        assert nothing_is_stored(scheduler)


@for_each_case(
    "row column reason",
    [
        (",Ann,,", "email", "EMAIL_MISSING"),
        ("ann,Ann,,", "email", "ADDRESS_INVALID"),
        ('"a@b.org, c@d.org",Ann,,', "email", "TWO_ADDRESSES"),
        ("a@b.org c@d.org,Ann,,", "email", "TWO_ADDRESSES"),
        ('"a@b.org\r\nBcc: c@d.org",Ann,,', "email", "CONTROL_CHARACTER"),
        ('a@b.org,"Ann\r\nBcc: c@d.org",,', "name", "SUBJECT_LINE_BREAK"),
        ("a@b.org,Ann", "", "RAGGED_ROW"),
        ("a@b.org,Ann,,,more", "", "RAGGED_ROW"),
        ("a@b.org,Ann,2026-02-30 10:00,", "schedule_time", "SCHEDULE_TIME_INVALID"),
        ("a@b.org,Ann,tomorrow,", "schedule_time", "SCHEDULE_TIME_INVALID"),
        ("a@b.org,Ann,2027-03-28 10:00,Mars/Olympus", "time_zone", "UNKNOWN_TIME_ZONE"),
        (
            "a@b.org,Ann,2027-03-28 02:30,Europe/Berlin",
            "schedule_time",
            "LOCAL_TIME_DOES_NOT_EXIST",
        ),
        ("a@b.org,Ann,2027-10-31 02:30,Europe/Berlin", "schedule_time", "LOCAL_TIME_AMBIGUOUS"),
        (f"a@b.org,{'x' * 996},,", "name", "SUBJECT_TOO_LONG"),
        (f"a@b.org,{'é' * 498},,", "name", "SUBJECT_TOO_LONG"),
    ],
)
async def test_a_bad_row_is_rejected_or_makes_a_strict_batch_fail(
    scheduler: Scheduler, sender: sender_pb2.Sender, row: str, column: str, reason: str
) -> None:
    csv = f"{CSV}good@b.org,Good,,\n{row}\nfine@b.org,Fine,,\n"
    subject = "Hi {{ name }}"
    before = stored_rows(scheduler, OF_BATCHES)
    refusal = await refusal_of(scheduler.schedule(sender, csv, subject=subject, mode=STRICT))
    assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "ROW_REJECTED")
    ((field, description),) = refusal.violations.items()
    assert field == (f"rows[2].{column}" if column else "rows[2]")
    assert description.startswith(f"{reason}: ")
    assert stored_rows(scheduler, OF_BATCHES) == before

    answer = await scheduler.schedule(sender, csv, subject=subject)
    assert (answer.batch.accepted_count, answer.batch.rejected_count) == (2, 1)
    (rejection,) = answer.rejections
    assert (rejection.row_number, rejection.column, rejection.reason) == (2, column, reason)
    assert rejection.message == description.removeprefix(f"{reason}: ")


@for_each_case(
    "options where reason",
    [
        ({"request_id": ""}, "request_id", "REQUEST_ID_REQUIRED"),
        ({"request_id": "x" * 129}, "request_id", "REQUEST_ID_INVALID"),
        ({"request_id": "a\0b"}, "request_id", "REQUEST_ID_INVALID"),
        ({"sender_id": ""}, "sender_id", "SENDER_ID_REQUIRED"),
        ({"subject": "Hi {{ name"}, "subject", "TEMPLATE_INVALID"),
        ({"body": "one\ntwo {% if %}"}, "body", "TEMPLATE_INVALID"),
        ({"html": "<p>{{ name | nonsense }}</p>"}, "html", "TEMPLATE_INVALID"),
        ({"body": "a\0b"}, "body", "TEMPLATE_INVALID"),
        ({"body": "x" * (256 * 1024 + 1)}, "body", "TEMPLATE_TOO_LARGE"),
        ({"subject": "Hi\nBcc: c@d.org"}, "subject", "SUBJECT_LINE_BREAK"),
        ({"spacing": Duration(seconds=-1)}, "spacing", "SPACING_INVALID"),
        ({"spacing": Duration(seconds=7 * 86_400 + 1)}, "spacing", "SPACING_INVALID"),
        ({"time_zone": "Mars/Olympus"}, "time_zone", "UNKNOWN_TIME_ZONE"),
        ({"schedule_time": Timestamp(seconds=2**60)}, "schedule_time", "INVALID_INPUT"),
        ({"expire_after": Duration()}, "expire_after", "EXPIRE_AFTER_INVALID"),
        # An id that is none hides no wrong field.
        (
            {"sender_id": "q", "spacing": Duration(seconds=-1)},
            "spacing",
            "SPACING_INVALID",
        ),
        ({"user_id": "a\0b"}, "user_id", "USER_ID_INVALID"),
        # All of them are named, and the reason is that of the first.
        (
            {"spacing": Duration(seconds=-1), "skip_lines": -1, "time_zone": "Mars/Olympus"},
            "spacing skip_lines time_zone",
            "SPACING_INVALID",
        ),
        (
            {"request_id": "x" * 129, "external_id": "x" * 129},
            "request_id external_id",
            "REQUEST_ID_INVALID",
        ),
    ],
)
async def test_an_invalid_option_is_named_and_nothing_is_stored(
    scheduler: Scheduler,
    sender: sender_pb2.Sender,
    options: dict[str, Any],
    where: str,
    reason: str,
) -> None:
    refusal = await refusal_of(scheduler.schedule(sender, **options))
    assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", reason)
    assert list(refusal.violations) == [f"options.{field}" for field in where.split()]
    assert nothing_is_stored(scheduler)


async def test_a_template_that_does_not_parse_is_refused_with_its_position(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    refusal = await refusal_of(scheduler.schedule(sender, body="one\ntwo {{ name | nonsense }}"))
    assert "line 2, column" in refusal.message


async def test_times_beyond_the_calendar_are_refused(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    start = timestamp(datetime(9999, 12, 31, tzinfo=UTC))
    csv = "email\na@b.org\nb@b.org\n"
    refusal = await refusal_of(
        scheduler.schedule(sender, csv, schedule_time=start, spacing=Duration(seconds=86_400))
    )
    assert refusal.reason == "SPACING_INVALID"
    assert nothing_is_stored(scheduler)


async def test_a_batch_without_a_valid_row_is_refused(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    refusal = await refusal_of(scheduler.schedule(sender, "email\nx\n\ny\n"))
    assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "NO_ROW_ACCEPTED")
    assert list(refusal.violations) == ["rows[1].email", "rows[3].email"]
    assert nothing_is_stored(scheduler)


async def test_a_batch_without_recipients_is_refused(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    for payload in ({}, {"recipients": batch_pb2.Recipients()}):
        request = ScheduleBatchRequest(options=options_for(sender), **payload)  # type: ignore[arg-type]
        refusal = await refusal_of(scheduler.batches.ScheduleBatch(request))
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "PAYLOAD_REQUIRED")


async def test_a_csv_over_4_mib_must_be_uploaded(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    csv = b"email,x\na@b.org," + b"x" * 4 * 1024 * 1024 + b"\n"
    refusal = await refusal_of(scheduler.schedule(sender, csv))
    assert (refusal.code, refusal.reason) == ("RESOURCE_EXHAUSTED", "CSV_TOO_LARGE")
    answer = await upload(
        scheduler, options_for(sender), [csv[i : i + 65_536] for i in range(0, len(csv), 65_536)]
    )
    assert answer.batch.accepted_count == 1


async def test_an_upload_out_of_order_is_refused(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    options = UploadBatchRequest(options=options_for(sender))
    chunk = UploadBatchRequest(chunk=b"email\na@b.org\n")
    for parts in ([], [chunk], [options, chunk, options], [options, UploadBatchRequest()]):

        async def messages(
            parts: list[UploadBatchRequest] = parts,
        ) -> AsyncIterator[UploadBatchRequest]:
            for part in parts:
                yield part

        refusal = await refusal_of(scheduler.batches.UploadBatch(messages()))
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "UPLOAD_OUT_OF_ORDER")
    assert nothing_is_stored(scheduler)


async def test_the_rest_of_a_refused_upload_is_read(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    """A caller may lose an answer that arrives while it sends."""
    sent = 0

    async def messages(count: float) -> AsyncIterator[UploadBatchRequest]:
        nonlocal sent
        yield UploadBatchRequest(options=options_for(sender, sender_id="999999"))
        while sent < count:
            sent += 1
            yield UploadBatchRequest(chunk=b"a@b.org\n" * 16_000)

    refusal = await refusal_of(scheduler.batches.UploadBatch(messages(200)))
    assert (refusal.reason, sent) == ("SENDER_NOT_FOUND", 200)
    # Who never ends gets an answer as well.
    refusal = await refusal_of(scheduler.batches.UploadBatch(messages(math.inf)))
    assert refusal.reason == "SENDER_NOT_FOUND"
    assert nothing_is_stored(scheduler)


async def test_an_unknown_sender_is_not_found(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    for options in ({"sender_id": "999999"}, {"sender_id": "x"}, {"user_id": "bob"}):
        refusal = await refusal_of(scheduler.schedule(sender, **options))
        assert (refusal.code, refusal.reason) == ("NOT_FOUND", "SENDER_NOT_FOUND")
    assert nothing_is_stored(scheduler)


async def test_a_strict_batch_names_the_first_rejections(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    csv = "email\n" + "a@b.org\n" + "x\n" * 20_000
    refusal = await refusal_of(scheduler.schedule(sender, csv, mode=STRICT))
    # As many as fit into the trailers of a call.
    assert len(refusal.violations) > 10
    assert list(refusal.violations)[:2] == ["rows[2].email", "rows[3].email"]
    assert nothing_is_stored(scheduler)


# Reading and cancelling


async def test_a_batch_of_another_user_is_not_found(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    batch = (await scheduler.schedule(sender, "email\na@b.org\nx\n")).batch.batch_id
    for batch_id in (batch, "999999", "x"):
        for call in (
            scheduler.batches.GetBatch(GetBatchRequest(batch_id=batch_id, user_id="bob")),
            scheduler.batches.CancelBatch(CancelBatchRequest(batch_id=batch_id, user_id="bob")),
            scheduler.batches.ListRejections(
                ListRejectionsRequest(batch_id=batch_id, user_id="bob")
            ),
        ):
            refusal = await refusal_of(call)
            assert (refusal.code, refusal.reason) == ("NOT_FOUND", "BATCH_NOT_FOUND")
            assert refusal.message == (
                f"there is no batch {batch_id!r}, or it was removed after OUTBOX_RETENTION"
            )
    listed = await scheduler.batches.ListBatches(ListBatchesRequest(user_id="bob"))
    assert list(listed.batches) == []
    listed = await scheduler.batches.ListBatches(
        ListBatchesRequest(user_id="bob", sender_id=sender.sender_id)
    )
    assert list(listed.batches) == []
    assert scheduler.value("SELECT state FROM batches") == 1


async def test_batches_are_listed_in_pages_newest_first(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    other = await scheduler.sender()
    made = [(await scheduler.schedule(sender, html="<p>")).batch.batch_id for _ in range(3)]
    await scheduler.schedule(other)
    refusal = await refusal_of(scheduler.batches.ListBatches(ListBatchesRequest()))
    assert refusal.reason == "USER_ID_REQUIRED"
    seen, token = [], ""
    for _ in range(2):
        page = await scheduler.batches.ListBatches(
            ListBatchesRequest(sender_id=sender.sender_id, page_size=2, page_token=token)
        )
        seen += [batch.batch_id for batch in page.batches]
        token = page.next_page_token
        for batch in page.batches:
            assert not batch.HasField("html")
            assert batch.counts.scheduled_count == 1
    assert (seen, token) == (made[::-1], "")
    everything = await scheduler.batches.ListBatches(ListBatchesRequest(user_id="ann"))
    assert len(everything.batches) == 4


async def test_rejections_are_listed_in_pages_in_the_order_of_the_rows(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    csv = "email,\u00dcber Name\na@b.org,x\n" + "".join(f'x{i}\\\t"a"\n' for i in range(120))
    answer = await scheduler.schedule(sender, csv)
    assert (answer.batch.rejected_count, len(answer.rejections)) == (120, 100)
    seen, token = [], ""
    for _ in range(3):
        page = await scheduler.batches.ListRejections(
            ListRejectionsRequest(batch_id=answer.batch.batch_id, page_size=50, page_token=token)
        )
        seen += list(page.rejections)
        token = page.next_page_token
    assert token == ""
    assert seen[:100] == list(answer.rejections)
    assert [rejection.row_number for rejection in seen] == list(range(2, 122))


async def test_cancelling_a_batch_reports_how_many_jobs_were_too_late(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    csv = "email\n" + "".join(f"u{i}@b.org\n" for i in range(6))
    batch = (await scheduler.schedule(sender, csv)).batch
    first, second, third = scheduler.rows("SELECT id FROM email_jobs ORDER BY id LIMIT 3")
    scheduler.execute("UPDATE email_jobs SET state = 2, lease_until = now() WHERE id = %s", *first)
    scheduler.end_jobs(JobState.SENT, "id = %s", *second)
    scheduler.end_jobs(JobState.SUPPRESSED, "id = %s", *third)
    request = CancelBatchRequest(batch_id=batch.batch_id)
    answer = await scheduler.batches.CancelBatch(request)
    assert (answer.cancelled_count, answer.too_late_count) == (3, 2)
    assert answer.batch.state == batch_pb2.BATCH_STATE_CANCELLED
    counts = answer.batch.counts
    assert (counts.cancelled_count, counts.sending_count, counts.sent_count) == (3, 1, 1)
    assert counts.scheduled_count == 0
    again = await scheduler.batches.CancelBatch(request)
    assert (again.cancelled_count, again.too_late_count) == (0, 2)
    assert again.batch.cancel_time == answer.batch.cancel_time
    await eventually(lambda: scheduler.value("SELECT count(*) = 0 FROM head_markers"))


async def test_a_batch_is_done_when_its_last_job_is_done(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    batch = (await scheduler.schedule(sender)).batch
    scheduler.end_jobs(JobState.SENT)
    now = await scheduler.batches.GetBatch(GetBatchRequest(batch_id=batch.batch_id))
    assert now.state == batch_pb2.BATCH_STATE_DONE
    assert not now.HasField("forecast_end_time")
