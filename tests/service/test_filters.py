"""Filters and orders of the list methods, over a real channel, on real stores."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import pairwise
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.message_factory import GetMessageClass
from outbox.v1 import email_job_pb2, sender_pb2
from outbox.v1.batch_pb2 import Recipient
from outbox.v1.batch_service_pb2 import (
    CancelBatchRequest,
    ListBatchesRequest,
    SendTestEmailRequest,
)
from outbox.v1.email_job_pb2 import EmailJob, EmailJobState
from outbox.v1.email_job_service_pb2 import ListEmailJobsRequest
from outbox.v1.sender_service_pb2 import ListSendersRequest, PauseSenderRequest
from outbox.v1.suppression_pb2 import Suppression
from outbox.v1.suppression_service_pb2 import CreateSuppressionRequest, ListSuppressionsRequest

from outbox_server.services.scheduler.storage import bounded, walking
from outbox_server.services.stats.storage import fold_once
from outbox_server.shared.auth.keys import ApiKeyKind, make_key
from outbox_server.shared.auth.store import insert_key
from outbox_server.shared.database.engine import create_engine
from outbox_server.shared.rpc.proto_mapping import to_timestamp
from tests.contract_methods import contract_methods
from tests.for_each import for_each_case
from tests.scheduler_stack import Scheduler, options_for, refusal_of, running_scheduler

SENT = email_job_pb2.EMAIL_JOB_STATE_SENT
FAILED = email_job_pb2.EMAIL_JOB_STATE_FAILED
SENDING = email_job_pb2.EMAIL_JOB_STATE_SENDING
SCHEDULED = email_job_pb2.EMAIL_JOB_STATE_SCHEDULED
CANCELLED = email_job_pb2.EMAIL_JOB_STATE_CANCELLED
# The states of the first rows of each batch, by which the row number is divided.
_STATES = {2: SENT, 3: FAILED, 5: SENDING}


@pytest_asyncio.fixture
async def scheduler(database_url: str, redis_url: str) -> AsyncIterator[Scheduler]:
    async with running_scheduler(database_url, redis_url, min_gap="0") as running:
        yield running


async def schedule(
    scheduler: Scheduler, sender: sender_pb2.Sender, rows: int, **options: Any
) -> str:
    """Schedule a batch, and end some of its jobs as a dispatcher would; return its id."""
    csv = "email\n" + "".join(f"user{number}@b.org\n" for number in range(rows))
    batch_id = (await scheduler.schedule(sender, csv, **options)).batch.batch_id
    now = datetime.now(UTC)
    for divisor, state in _STATES.items():
        moved = scheduler.rows(
            """
            UPDATE email_jobs
            SET state = %s, attempt = row_number, lease_until = %s, finished_at = %s
            WHERE batch_id = %s AND state = 1 AND mod(row_number, %s) = 0
            RETURNING sender_id
            """,
            int(state),
            now if state == SENDING else None,
            None if state == SENDING else now,
            int(batch_id),
            divisor,
        )
        changes = {} if state == SENDING else {SCHEDULED: -len(moved), state: len(moved)}
        for counted, n in changes.items():
            scheduler.execute(
                "INSERT INTO count_deltas (sender_id, batch_id, hour, state, n)"
                " VALUES (%s, %s, date_trunc('hour', now()), %s, %s)",
                int(sender.sender_id),
                int(batch_id),
                int(counted),
                n,
            )
    return batch_id


async def listed(scheduler: Scheduler, page_size: int = 7, **fields: Any) -> list[EmailJob]:
    """Return the jobs of all pages; a page may be short."""
    found: list[EmailJob] = []
    request = ListEmailJobsRequest(page_size=page_size, **fields)
    for _ in range(10_000):
        page = await scheduler.jobs.ListEmailJobs(request)
        assert len(page.email_jobs) <= page_size
        found += page.email_jobs
        if not page.next_page_token:
            return found
        request.page_token = page.next_page_token
    raise AssertionError("the list has no end")


def ids(jobs: Iterable[EmailJob]) -> list[str]:
    return [job.email_job_id for job in jobs]


TIME = datetime(2026, 1, 1, tzinfo=UTC)
# Filters, and the same in Python.
FILTERS: dict[str, Callable[[EmailJob], bool]] = {
    "state = FAILED": lambda job: job.state == FAILED,
    "state = FAILED OR state = SENT": lambda job: job.state in (FAILED, SENT),
    "state = SENDING": lambda job: job.state == SENDING,
    "state = SENDING AND row_number > 4": lambda job: job.state == SENDING and job.row_number > 4,
    "state = CANCELLED": lambda job: job.state == CANCELLED,
    "state != SCHEDULED": lambda job: job.state != SCHEDULED,
    "NOT (state = SENT OR row_number < 9)": lambda job: (
        not (job.state == SENT or job.row_number < 9)
    ),
    "attempt_count = 0 AND NOT state = CANCELLED": lambda job: (
        job.attempt_count == 0 and job.state != CANCELLED
    ),
    "recipient = USER3@b.org": lambda job: job.recipient == "user3@b.org",
    "recipient = user2@b.org AND state = FAILED": lambda job: (
        job.recipient == "user2@b.org" and job.state == FAILED
    ),
    "recipient != user3@b.org": lambda job: job.recipient != "user3@b.org",
    "recipient = user3@b.org OR row_number = 1": lambda job: (
        job.recipient == "user3@b.org" or job.row_number == 1
    ),
    "recipient = nobody": lambda _: False,
    "batch_id = 12": lambda _: False,
    "finish_time > 2026-01-01T00:00:00Z": lambda job: job.HasField("finish_time"),
    "NOT finish_time > 2026-01-01T00:00:00Z": lambda job: not job.HasField("finish_time"),
    "finish_time != 2026-01-01T00:00:00Z": lambda _: True,
    "send_time > 2026-01-01T00:00:00Z": lambda job: job.state == SENT,
    "send_time != 2026-01-01T00:00:00Z": lambda _: True,
    "create_time > 2026-01-01T00:00:00Z": lambda _: True,
    "create_time < 2026-01-01T00:00:00Z": lambda _: False,
    "create_time < 2026-01-01T00:00:00Z OR state = SENT": lambda job: job.state == SENT,
    "schedule_time < 2026-01-01T00:00:00Z": lambda _: False,
    "test = true": lambda job: job.test,
    "test != True AND NOT state = SENT": lambda job: not job.test and job.state != SENT,
    "test = TRUE OR row_number = 2": lambda job: job.test or job.row_number == 2,
}


@pytest.mark.parametrize("small_budget", [False, True])
async def test_a_filter_lists_what_it_means_in_both_orders(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch, small_budget: bool
) -> None:
    """With a small budget, every page is short, and every walk is continued."""
    anns = await scheduler.sender("ann")
    others = await scheduler.sender("bob")
    for rows in (13, 1, 8, 4):
        await schedule(scheduler, anns, rows)
        await schedule(scheduler, others, 5)
    cancelled = await schedule(scheduler, anns, 10)
    await scheduler.batches.CancelBatch(CancelBatchRequest(batch_id=cancelled))
    await scheduler.batches.SendTestEmail(
        SendTestEmailRequest(options=options_for(anns), recipient=Recipient(email="me@b.org"))
    )
    listing = ListBatchesRequest(user_id="ann", filter="test = true")
    assert [one.test for one in (await scheduler.batches.ListBatches(listing)).batches] == [True]
    engine = create_engine(scheduler.settings)
    every = await listed(scheduler, user_id="ann")
    assert len(every) == 37
    if small_budget:
        monkeypatch.setattr(walking, "ROWS_READ", 3)
        monkeypatch.setattr(walking, "_BATCHES_SEEN", 2)
        monkeypatch.setattr(walking, "_BATCHES_AT_ONCE", 2)
    if not small_budget:
        await fold_once(engine)
    for text, means in list(FILTERS.items())[:: 4 if small_budget else 1]:
        expected = [job for job in every if means(job)]
        if not expected:
            assert text.endswith(("nobody", "12", "00Z")), text
        found = await listed(scheduler, 20, user_id="ann", filter=text)
        assert ids(found) == ids(expected), text
        found = await listed(scheduler, user_id="ann", filter=text, order_by="create_time desc")
        assert ids(found) == ids(expected[::-1]), text
    await engine.dispose()


async def test_the_fields_of_the_request_and_the_filter_must_both_match(
    scheduler: Scheduler,
) -> None:
    sender = await scheduler.sender("ann")
    batch = await schedule(scheduler, sender, 12)
    await schedule(scheduler, sender, 12)
    found = await listed(scheduler, batch_id=batch, state=FAILED, filter="row_number < 9")
    assert [job.row_number for job in found] == [3]
    assert await listed(scheduler, batch_id=batch, state=FAILED, filter="state = SENT") == []
    # A filter that names one batch needs no user.
    found = await listed(scheduler, filter=f"batch_id = {batch} AND state = SENDING")
    assert [job.row_number for job in found] == [5]
    refusal = await refusal_of(listed(scheduler, filter=f"batch_id = {batch} OR row_number = 1"))
    assert refusal.reason == "USER_ID_REQUIRED"


async def test_waiting_jobs_of_a_sender_are_listed_in_the_order_of_their_due_times(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender = await scheduler.sender("ann")
    later = to_timestamp(datetime.now(UTC) + timedelta(hours=1))
    first = await schedule(scheduler, sender, 20, schedule_time=later)
    second = await schedule(scheduler, sender, 20)
    third = await schedule(scheduler, sender, 20)
    await scheduler.batches.CancelBatch(CancelBatchRequest(batch_id=third))
    fields: dict[str, Any] = {"sender_id": sender.sender_id, "filter": "state = SCHEDULED"}
    monkeypatch.setattr(walking, "ROWS_READ", 4)
    found = await listed(scheduler, order_by="schedule_time", **fields)
    assert [job.batch_id for job in found] == [second] * 6 + [first] * 6
    times = [(job.schedule_time.ToDatetime(), int(job.email_job_id)) for job in found]
    assert all(one < other for one, other in pairwise(times))
    backwards = await listed(scheduler, order_by="schedule_time desc", **fields)
    assert ids(backwards) == ids(found[::-1])
    assert await listed(scheduler, user_id="bob", order_by="schedule_time", **fields) == []
    wrongs: list[dict[str, Any]] = [
        {"user_id": "ann"},
        {"user_id": "ann", "sender_id": sender.sender_id},
    ]
    for wrong in wrongs:
        refusal = await refusal_of(listed(scheduler, order_by="schedule_time", **wrong))
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "ORDER_BY_INVALID")
        assert "state = SCHEDULED and one sender_id" in refusal.violations["order_by"]


async def test_a_range_of_times_begins_at_the_batches_of_that_time(scheduler: Scheduler) -> None:
    sender = await scheduler.sender("ann")
    batches = [await schedule(scheduler, sender, 2) for _ in range(3)]
    # Ids of the present time, created in the past: no clock is trusted by more than a day.
    for days, batch in enumerate(batches):
        scheduler.execute(
            "UPDATE batches SET created_at = now() - %s * interval '12 h' WHERE id = %s",
            days,
            int(batch),
        )
    now = datetime.now(UTC)
    for hours, expected in ((1, batches[:1]), (13, batches[:2]), (25, batches)):
        since = (now - timedelta(hours=hours)).isoformat()
        for order in ("create_time", "create_time desc"):
            found = await listed(
                scheduler, user_id="ann", filter=f"create_time > {since}", order_by=order
            )
            assert {job.batch_id for job in found} == set(expected), (hours, order)
            assert len(found) == 2 * len(expected)
    # Batches of older releases have ids from a sequence, which say nothing about their time.
    scheduler.execute("UPDATE email_jobs SET batch_id = 5 WHERE batch_id = %s", int(batches[0]))
    scheduler.execute("UPDATE batches SET id = 5 WHERE id = %s", int(batches[0]))
    since = (now - timedelta(hours=1)).isoformat()
    for order in ("create_time", "create_time desc"):
        found = await listed(
            scheduler, user_id="ann", filter=f"create_time > {since}", order_by=order
        )
        assert [job.batch_id for job in found] == ["5", "5"], order


async def test_a_page_token_belongs_to_one_filter_and_order(scheduler: Scheduler) -> None:
    sender = await scheduler.sender("ann")
    await schedule(scheduler, sender, 9)
    request = ListEmailJobsRequest(user_id="ann", page_size=2, filter="row_number < 9")
    token = (await scheduler.jobs.ListEmailJobs(request)).next_page_token
    assert token
    for changed in (
        ListEmailJobsRequest(user_id="ann", page_token=token),
        ListEmailJobsRequest(user_id="ann", page_token=token, filter="row_number < 8"),
        ListEmailJobsRequest(
            user_id="ann", page_token=token, filter="row_number < 9", order_by="create_time desc"
        ),
    ):
        refusal = await refusal_of(scheduler.jobs.ListEmailJobs(changed))
        assert refusal.reason == "PAGE_TOKEN_INVALID"


async def test_a_wrong_filter_is_refused_by_every_list(scheduler: Scheduler) -> None:
    lists = {
        method.name: method.input_type
        for method in contract_methods()
        if method.name.startswith("List")
    }
    assert all({"filter", "order_by"} <= set(kind.fields_by_name) for kind in lists.values())
    stubs = vars(scheduler).values()
    # test_dispatcher_reports.py has those of other services.
    for name in lists.keys() - {"ListDispatchers", "ListEndpointStats"}:
        kind = lists[name]
        call: Any = next(getattr(stub, name) for stub in stubs if hasattr(stub, name))
        ids = {"user_id": "ann", "batch_id": "1", "webhook_id": "1", "email_job_id": "1"}
        ids = {field: ids[field] for field in ids.keys() & kind.fields_by_name.keys()}
        request = partial(GetMessageClass(kind), **ids)
        refusal = await refusal_of(call(request(filter="nothing = 1")))
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "FILTER_INVALID")
        assert "there is no field 'nothing'" in refusal.violations["filter"]
        assert refusal.metadata["position"] == "1"
        refusal = await refusal_of(call(request(order_by="nothing")))
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "ORDER_BY_INVALID")
        assert "must be one of" in refusal.violations["order_by"]


async def test_batches_are_filtered_and_ordered(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender, other = await scheduler.sender("ann"), await scheduler.sender("ann")
    bobs = await scheduler.sender("bob")
    active = [await schedule(scheduler, sender, 7) for _ in range(3)]
    done = await schedule(scheduler, other, 1)
    scheduler.end_jobs(SENT, "batch_id = %s", int(done))
    cancelled = await schedule(scheduler, other, 7, request_id="the-cancelled-one")
    await scheduler.batches.CancelBatch(CancelBatchRequest(batch_id=cancelled))
    await schedule(scheduler, bobs, 7, request_id="the-cancelled-one")
    every = [*active, done, cancelled]

    async def found(**fields: Any) -> list[str]:
        seen, token = [], ""
        while True:
            page = await scheduler.batches.ListBatches(
                ListBatchesRequest(user_id="ann", page_size=2, page_token=token, **fields)
            )
            seen += [batch.batch_id for batch in page.batches]
            token = page.next_page_token
            if not token:
                return seen

    for most in (bounded.MOST_READ, 2):
        monkeypatch.setattr(bounded, "MOST_READ", most)
        for text, expected in (
            ("", every),
            ("state = ACTIVE", active),
            ("state = DONE", [done]),
            ("NOT state = DONE", [*active, cancelled]),
            ("state = CANCELLED", [cancelled]),
            ("request_id = the-cancelled-one", [cancelled]),
            (f"sender_id = {other.sender_id}", [done, cancelled]),
            (f"sender_id != {other.sender_id}", active),
            ("accepted_count < 7", [done]),
            ("rejected_count > 0", []),
            ("create_time > 2026-01-01T00:00:00Z AND schedule_time > 2026-01-01T00:00:00Z", every),
        ):
            assert await found(filter=text) == expected[::-1], text
            assert await found(filter=text, order_by="create_time") == expected, text


async def test_senders_and_suppressions_are_filtered_and_ordered(scheduler: Scheduler) -> None:
    senders = [await scheduler.sender("ann", email=f"s{n}@example.com") for n in range(3)]
    await scheduler.sender("bob", email="s0@example.com")
    await scheduler.senders.PauseSender(PauseSenderRequest(sender_id=senders[1].sender_id))
    for address in ("a@b.org", "c@d.org"):
        await scheduler.suppressions.CreateSuppression(
            CreateSuppressionRequest(
                user_id="ann", suppression=Suppression(email=address, reason=address)
            )
        )
    for text, order, expected in (
        ("state = PAUSED", "", ["s1@example.com"]),
        ("state = ACTIVE", "create_time desc", ["s2@example.com", "s0@example.com"]),
        ("email = s0@example.com", "", ["s0@example.com"]),
        ("create_time < 2026-01-01T00:00:00Z", "", []),
    ):
        request = ListSendersRequest(user_id="ann", filter=text, order_by=order)
        page = await scheduler.senders.ListSenders(request)
        assert [sender.email for sender in page.senders] == expected, text
    for text, order, expected in (
        ("", "email desc", ["c@d.org", "a@b.org"]),
        ("reason = c@d.org", "", ["c@d.org"]),
        ("create_time > 2026-01-01T00:00:00Z", "", ["a@b.org", "c@d.org"]),
    ):
        seen, token = [], ""
        while True:
            asked = ListSuppressionsRequest(
                user_id="ann", filter=text, order_by=order, page_size=1, page_token=token
            )
            found = await scheduler.suppressions.ListSuppressions(asked)
            seen += [each.email for each in found.suppressions]
            token = found.next_page_token
            if not token:
                break
        assert seen == expected, text


async def test_an_operator_lists_the_jobs_of_all_users(database_url: str, redis_url: str) -> None:
    keys = {kind: make_key() for kind in (ApiKeyKind.SERVICE, ApiKeyKind.OPERATOR)}
    async with running_scheduler(database_url, redis_url, auth="keys", min_gap="0") as scheduler:
        engine = create_engine(scheduler.settings)
        async with engine.begin() as connection:
            for kind, key in keys.items():
                await insert_key(connection, key, kind, None, "")
        await engine.dispose()
        for user in ("ann", "bob"):
            scheduler.execute(
                "INSERT INTO senders (user_id, email, hourly_limit) VALUES (%s, 's@x.org', 9)", user
            )
        scheduler.execute(
            "INSERT INTO batches (user_id, sender_id, request_id, request_hash, start_at,"
            " duplicates, mode, accepted_count)"
            " SELECT user_id, id, 'r', '', now(), 1, 1, 1 FROM senders"
        )
        scheduler.execute(
            "INSERT INTO email_jobs (batch_id, sender_id, scheduled_at, row_number, recipient)"
            " SELECT id, sender_id, now(), 1, 'a@b.org' FROM batches"
        )

        async def users(kind: ApiKeyKind) -> list[str]:
            page = await scheduler.jobs.ListEmailJobs(
                ListEmailJobsRequest(filter="row_number = 1"),
                metadata=(("authorization", f"Bearer {keys[kind].text}"),),
            )
            return [job.user_id for job in page.email_jobs]

        assert await users(ApiKeyKind.OPERATOR) == ["ann", "bob"]
        with pytest.raises(grpc.aio.AioRpcError, match="is required"):
            await users(ApiKeyKind.SERVICE)


def test_every_state_can_be_named() -> None:
    assert {name.removeprefix("EMAIL_JOB_STATE_") for name in EmailJobState.keys()[1:]} == {
        *("SCHEDULED", "SENDING", "SENT", "FAILED", "UNCERTAIN"),
        *("CANCELLED", "SUPPRESSED", "EXPIRED"),
    }


@for_each_case(
    "text",
    [
        ("attempt_count > 40000",),
        ("row_number = 3000000000",),
        ("row_number != 999999999999999999",),
        ("attempt_count < 999999999999999999",),
    ],
)
async def test_a_number_beyond_every_column_matches_like_any_other(
    scheduler: Scheduler, text: str
) -> None:
    accepted = await scheduler.schedule(await scheduler.sender())
    found = await scheduler.jobs.ListEmailJobs(
        ListEmailJobsRequest(batch_id=accepted.batch.batch_id, filter=text)
    )
    assert len(found.email_jobs) == (1 if ("!=" in text or "<" in text) else 0)
