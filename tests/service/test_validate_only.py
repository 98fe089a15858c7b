"""Calls with `validate_only`: the full answer of the call, and nothing stored."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import pytest_asyncio
import redis
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp
from outbox.v1 import batch_pb2, sender_pb2
from outbox.v1.batch_service_pb2 import (
    ScheduleBatchRequest,
    ScheduleBatchResponse,
    UploadBatchFileRequest,
    UploadBatchRequest,
)
from outbox.v1.sender_service_pb2 import (
    CreateSenderRequest,
    DeleteSenderRequest,
    GetSenderRequest,
    PauseSenderRequest,
    UpdateSenderRequest,
)
from outbox.v1.suppression_pb2 import Suppression
from outbox.v1.suppression_service_pb2 import CreateSuppressionRequest

from tests.fingerprint import Fingerprint
from tests.scheduler_stack import Scheduler, options_for, refusal_of, running_scheduler, stored

QUOTAS = {"user_senders": 3, "user_waiting_jobs": 30, "user_stored_rejections": 2}
LATER = datetime.now(UTC) + timedelta(hours=2)
# One row each: accepted, a duplicate, rejected, suppressed, accepted with an own time, accepted,
# and two rejected ones of which the second is above the quota.
CSV = (
    "email,name,schedule_time\na@b.org,Ann,\nA@b.org,Ann,\nnowhere,Bob,\ngone@b.org,Eve,\n"
    f"c@b.org,Cid,{LATER.isoformat()}\nd@b.org,Dan,\ntwo@b.org two@c.org,Eli,\n@,Fay,\n"
)


@pytest_asyncio.fixture
async def scheduler(database_url: str, redis_url: str) -> AsyncIterator[Scheduler]:
    async with running_scheduler(database_url, redis_url, **QUOTAS) as running:
        yield running


@pytest_asyncio.fixture
async def sender(scheduler: Scheduler) -> sender_pb2.Sender:
    made = await scheduler.sender(hourly_limit=100, min_gap=Duration(seconds=60))
    await scheduler.suppressions.CreateSuppression(
        CreateSuppressionRequest(user_id="ann", suppression=Suppression(email="gone@b.org"))
    )
    return made


def in_redis(url: str) -> dict[Any, Any]:
    with redis.Redis.from_url(url) as client:
        return {key: client.dump(key) for key in client.scan_iter()}


@pytest.fixture
def unchanged(scheduler: Scheduler, redis_url: str) -> AbstractAsyncContextManager[None]:
    """Check that what is called within it changes no table and no key."""

    @asynccontextmanager
    async def check() -> AsyncIterator[None]:
        tables = Fingerprint(scheduler)
        before = await tables.take(), in_redis(redis_url)
        yield
        assert (await tables.take(), in_redis(redis_url)) == before
        assert scheduler.value("SELECT count(*) FROM head_markers") == 0
        assert scheduler.value("SELECT count(*) FROM count_deltas") == 0

    return check()


def comparable(answer: ScheduleBatchResponse) -> ScheduleBatchResponse:
    """Return an answer without what differs between two calls."""
    kept = ScheduleBatchResponse()
    kept.CopyFrom(answer)
    kept.batch.ClearField("batch_id")
    kept.batch.ClearField("etag")
    for time in ("create_time", "schedule_time", "forecast_end_time"):
        kept.batch.ClearField(time)
    kept.ClearField("forecast_end_time")
    # That of a spread batch depends on its beginning.
    if kept.batch.spacing.nanos:
        kept.batch.ClearField("spacing")
    return kept


def timestamp(time: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(time)
    return stamp


@pytest.mark.parametrize(
    "options",
    [
        {"spacing": Duration(seconds=300), "body": "Dear {{ name | upcase }}"},
        {"spread_until": timestamp(LATER), "duplicates": batch_pb2.DUPLICATE_POLICY_KEEP_ALL},
        {"expire_after": Duration(seconds=90), "html": "<p>{{ name }}</p>"},
    ],
)
async def test_a_checked_batch_has_the_answer_of_a_stored_one(
    scheduler: Scheduler,
    sender: sender_pb2.Sender,
    unchanged: AbstractAsyncContextManager[None],
    options: dict[str, Any],
) -> None:
    request = ScheduleBatchRequest(
        options=options_for(sender, **options), csv=CSV.encode(), require_forecast=True
    )
    async with unchanged:
        request.validate_only = True
        checked = await scheduler.batches.ScheduleBatch(request)
    request.validate_only = False
    stored = await scheduler.batches.ScheduleBatch(request)

    assert (checked.batch.batch_id, checked.batch.etag, checked.replayed) == ("", "", False)
    assert comparable(checked) == comparable(stored)
    assert checked.batch.suppressed_count == 1
    assert checked.batch.rejected_count == 3
    assert any("1 rejections are counted but not stored" in each for each in checked.notices)
    ends = [each.forecast_end_time.ToSeconds() for each in (checked, stored)]
    # The second one began a moment later.
    assert ends[0] <= ends[1] <= ends[0] + 60
    assert checked.batch.forecast_end_time == checked.forecast_end_time


async def test_an_upload_is_checked_with_its_duplicates_and_suppressions(
    scheduler: Scheduler, sender: sender_pb2.Sender, unchanged: AbstractAsyncContextManager[None]
) -> None:
    scheduler.execute(
        "INSERT INTO users (user_id, waiting_jobs) VALUES ('ann', 1000000)"
        " ON CONFLICT (user_id) DO UPDATE SET waiting_jobs = 1000000"
    )
    rows = [f"r{n % 40_000}@b.org\n".encode() for n in range(50_000)] + [b"gone@b.org\nbad\n"]
    file = b"email\n" + b"".join(rows)
    # Nothing is stored, so nothing needs to be safe to retry.
    options = options_for(sender, request_id="")

    async def messages() -> AsyncIterator[UploadBatchRequest]:
        yield UploadBatchRequest(options=options, validate_only=True)
        for start in range(0, len(file), 65_536):
            yield UploadBatchRequest(chunk=file[start : start + 65_536])

    async def files() -> AsyncIterator[UploadBatchFileRequest]:
        first = UploadBatchFileRequest(options=options, validate_only=True)
        first.file.data = file
        yield first

    async with unchanged:
        for answer in (
            await scheduler.batches.UploadBatch(messages()),
            await scheduler.batches.UploadBatchFile(files()),
        ):
            counts = answer.batch
            assert (counts.accepted_count, counts.duplicate_count) == (40_000, 10_000)
            assert (counts.suppressed_count, counts.rejected_count) == (1, 1)
            # The gap allows 60 mails an hour.
            last = answer.forecast_end_time.ToDatetime(UTC) - datetime.now(UTC)
            assert timedelta(hours=660) < last < timedelta(hours=670)


async def test_a_request_id_is_checked_and_not_used_up(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    request = ScheduleBatchRequest(
        options=options_for(sender), csv=b"email\na@b.org\n", validate_only=True
    )
    for _ in range(2):
        assert not (await scheduler.batches.ScheduleBatch(request)).replayed
    request.validate_only = False
    stored = await scheduler.batches.ScheduleBatch(request)
    assert not stored.replayed

    request.validate_only = True
    replayed = await scheduler.batches.ScheduleBatch(request)
    assert (replayed.replayed, replayed.batch.batch_id) == (True, stored.batch.batch_id)
    request.csv = b"email\nother@b.org\n"
    refusal = await refusal_of(scheduler.batches.ScheduleBatch(request))
    assert (refusal.code, refusal.reason) == ("ALREADY_EXISTS", "REQUEST_ID_REUSED")


async def test_a_batch_that_would_be_refused_is_refused(
    scheduler: Scheduler, sender: sender_pb2.Sender, unchanged: AbstractAsyncContextManager[None]
) -> None:
    many = "email\n" + "".join(f"r{n}@b.org\n" for n in range(31))
    cases: list[tuple[str, dict[str, Any], str | None]] = [
        (many, {}, "USER_WAITING_JOBS_EXCEEDED"),
        ("email\nbad\n", {}, "NO_ROW_ACCEPTED"),
        ("email\na@b.org\nbad\n", {"mode": batch_pb2.BATCH_MODE_STRICT}, "ROW_REJECTED"),
        ("email\na@b.org\n", {"body": "{{ name"}, "TEMPLATE_INVALID"),
        ("email\na@b.org\n", {"body": "{% for a in (1..1000000) %}{{ a }}{% endfor %}"}, None),
        ("name\nAnn\n", {}, "CSV_NO_EMAIL_COLUMN"),
    ]
    async with unchanged:
        for csv, options, reason in cases:
            refusals = set()
            for validate_only in (True, False):
                request = ScheduleBatchRequest(
                    options=options_for(sender, **options),
                    csv=csv.encode(),
                    validate_only=validate_only,
                )
                refusal = await refusal_of(scheduler.batches.ScheduleBatch(request))
                refusals.add((refusal.code, refusal.reason, str(refusal.violations)))
            assert len(refusals) == 1
            assert reason is None or reason in str(refusals)

    await scheduler.senders.DeleteSender(DeleteSenderRequest(sender_id=sender.sender_id))
    request = ScheduleBatchRequest(
        options=options_for(sender), csv=b"email\na@b.org\n", validate_only=True
    )
    refusal = await refusal_of(scheduler.batches.ScheduleBatch(request))
    assert refusal.reason == "SENDER_NOT_FOUND"


async def test_the_check_for_a_paused_sender_says_that_nothing_would_be_sent(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    await scheduler.senders.PauseSender(PauseSenderRequest(sender_id=sender.sender_id))
    request = ScheduleBatchRequest(
        options=options_for(sender), csv=b"email\na@b.org\n", validate_only=True
    )
    answer = await scheduler.batches.ScheduleBatch(request)
    assert not answer.HasField("forecast_end_time")
    assert any("paused" in notice for notice in answer.notices)


@pytest.mark.usefixtures("sender")
async def test_a_checked_sender_is_answered_and_not_created(
    scheduler: Scheduler, unchanged: AbstractAsyncContextManager[None]
) -> None:
    request = CreateSenderRequest(
        user_id="ann",
        sender=sender_pb2.Sender(email="two@example.com", hourly_limit=7),
        request_id="r1",
        validate_only=True,
    )
    async with unchanged:
        checked = await scheduler.senders.CreateSender(request)
    request.validate_only = False
    created = await scheduler.senders.CreateSender(request)

    assert (checked.sender_id, checked.etag) == ("", "")
    for answer in (checked, created):
        for changing in ("sender_id", "etag", "create_time", "update_time"):
            answer.ClearField(changing)
    assert checked == created
    # A later check with this id finds the call that was made.
    request.validate_only = True
    assert (await scheduler.senders.CreateSender(request)).sender_id
    request.sender.hourly_limit = 8
    refusal = await refusal_of(scheduler.senders.CreateSender(request))
    assert refusal.reason == "REQUEST_ID_REUSED"


@pytest.mark.usefixtures("sender")
async def test_the_check_of_a_sender_finds_what_the_call_would_find(
    scheduler: Scheduler, unchanged: AbstractAsyncContextManager[None]
) -> None:
    endpoint = sender_pb2.SmtpEndpoint(host="mail.example.com", port=22)
    wrong = sender_pb2.Sender(email="x@example.com", smtp=endpoint, hourly_limit=0)
    request = CreateSenderRequest(user_id="ann", sender=wrong, validate_only=True)
    async with unchanged:
        refusal = await refusal_of(scheduler.senders.CreateSender(request))
        assert set(refusal.violations) == {"sender.smtp.port", "sender.hourly_limit"}
    for _ in range(2):
        await scheduler.sender()
    request = CreateSenderRequest(
        user_id="ann", sender=sender_pb2.Sender(email="x@example.com"), validate_only=True
    )
    assert (await refusal_of(scheduler.senders.CreateSender(request))).reason == (
        "USER_SENDERS_EXCEEDED"
    )


async def test_a_checked_update_is_answered_and_not_made(
    scheduler: Scheduler, sender: sender_pb2.Sender, unchanged: AbstractAsyncContextManager[None]
) -> None:
    async with unchanged:
        changed = await scheduler.senders.UpdateSender(
            UpdateSenderRequest(
                sender=sender_pb2.Sender(sender_id=sender.sender_id, hourly_limit=5),
                update_mask=FieldMask(paths=["hourly_limit"]),
                request_id="r2",
                validate_only=True,
            )
        )
        assert (changed.hourly_limit, changed.effective_hourly_limit, changed.etag) == (5, 5, "")
        stale = sender_pb2.Sender(sender_id=sender.sender_id, hourly_limit=5, etag="other")
        refusal = await refusal_of(
            scheduler.senders.UpdateSender(UpdateSenderRequest(sender=stale, validate_only=True))
        )
        assert refusal.reason == "ETAG_MISMATCH"
    present = await scheduler.senders.GetSender(GetSenderRequest(sender_id=sender.sender_id))
    assert stored(present) == sender
