"""Headers, external ids and labels, from a call to the mail that a server received."""

from __future__ import annotations

from collections.abc import AsyncIterator
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default
from typing import Any

import pytest
import pytest_asyncio
from google.protobuf.timestamp_pb2 import Timestamp
from outbox.v1 import batch_pb2, email_job_pb2, sender_pb2
from outbox.v1.batch_service_pb2 import (
    CancelBatchRequest,
    GetBatchRequest,
    ListBatchesRequest,
    ScheduleBatchRequest,
    ScheduleBatchResponse,
)
from outbox.v1.email_job_service_pb2 import (
    CancelEmailJobsRequest,
    GetEmailJobRequest,
    ListEmailJobsRequest,
    RescheduleEmailJobsRequest,
    RetryEmailJobsRequest,
)
from outbox.v1.suppression_service_pb2 import EraseRecipientRequest

from outbox_server.services.scheduler.storage.job_filters import JobFilter
from outbox_server.services.scheduler.storage.walking import walk_jobs
from outbox_server.shared.database.engine import create_engine
from outbox_server.shared.filters.fields import FieldTest
from tests.dispatchers import options as dispatcher_options
from tests.dispatchers import running, settings_of
from tests.eventually import eventually
from tests.scheduler_stack import Scheduler, options_for, refusal_of, running_scheduler
from tests.smtp_servers import ScriptedServer

UNSUBSCRIBE = batch_pb2.MailHeader(
    name="list-unsubscribe", value="<https://shop.example/u?id={{ customer }}>"
)
ONE_CLICK = batch_pb2.MailHeader(name="List-Unsubscribe-Post", value="List-Unsubscribe=One-Click")
CSV = "email,Full Name,customer,Region\nann@b.org,Änne Müller,C-1,north\nbob@b.org,,C-2,\n"


@pytest_asyncio.fixture
async def scheduler(database_url: str, redis_url: str) -> AsyncIterator[Scheduler]:
    async with running_scheduler(database_url, redis_url, min_gap="0") as running:
        yield running


@pytest_asyncio.fixture
async def sender(scheduler: Scheduler) -> sender_pb2.Sender:
    return await scheduler.sender()


async def by_rows(
    scheduler: Scheduler, sender: sender_pb2.Sender, *rows: dict[str, Any], **options: Any
) -> ScheduleBatchResponse:
    request = ScheduleBatchRequest(options=options_for(sender, **options))
    for row in rows:
        request.recipients.rows.add(**{"email": "a@b.org", **row})
    return await scheduler.batches.ScheduleBatch(request)


async def found(
    scheduler: Scheduler, filter_: str, user_id: str = "ann", **more: Any
) -> list[email_job_pb2.EmailJob]:
    request = ListEmailJobsRequest(user_id=user_id, filter=filter_, **more)
    jobs: list[email_job_pb2.EmailJob] = []
    while True:
        page = await scheduler.jobs.ListEmailJobs(request)
        jobs += page.email_jobs
        if not page.next_page_token:
            return jobs
        request.page_token = page.next_page_token


async def rows_of(scheduler: Scheduler, filter_: str, user_id: str = "ann") -> list[str]:
    return [job.recipient for job in await found(scheduler, filter_, user_id)]


@pytest.mark.parametrize("body", ["Dear {{ full_name }}", "{% if customer %}Dear you{% endif %}"])
async def test_a_server_receives_the_headers_of_the_batch(
    scheduler: Scheduler, sender: sender_pb2.Sender, body: str
) -> None:
    async with ScriptedServer() as server:
        options = dispatcher_options(
            scheduler.settings.database_url, scheduler.settings.redis_url, server.url
        )
        answer = await scheduler.schedule(
            sender,
            CSV,
            body=body,
            reply_to='{{ full_name | default: "Shop" }} <help@shop.example>',
            name_column="Full Name",
            headers=[
                UNSUBSCRIBE,
                ONE_CLICK,
                batch_pb2.MailHeader(name="X-Region", value="{{ region | default: 'überall' }}"),
            ],
        )
        assert answer.batch.accepted_count == 2
        async with running(settings_of(options)):
            await eventually(lambda: len(server.taken) == 2)
        mails = {mail.rcpt_to: mail.data for mail in server.taken}
    ann, bob = (_parsed(mails[f"{name}@b.org"]) for name in ("ann", "bob"))
    assert [(each.display_name, each.addr_spec) for each in ann["To"].addresses] == [
        ("Änne Müller", "ann@b.org")
    ]
    assert bob["To"] == "bob@b.org"
    assert ann["Reply-To"].addresses[0].display_name == "Änne Müller"
    assert bob["Reply-To"] == "Shop <help@shop.example>"
    assert ann["List-Unsubscribe"] == "<https://shop.example/u?id=C-1>"
    assert bob["List-Unsubscribe"] == "<https://shop.example/u?id=C-2>"
    assert ann["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"
    assert (ann["X-Region"], bob["X-Region"]) == ("north", "überall")

    batch = await scheduler.batches.GetBatch(GetBatchRequest(batch_id=answer.batch.batch_id))
    assert [each.name for each in batch.headers][:2] == ["List-Unsubscribe", ONE_CLICK.name]
    assert (batch.reply_to, batch.name_column) == (answer.batch.reply_to, "full_name")
    [listed] = (await scheduler.batches.ListBatches(ListBatchesRequest(user_id="ann"))).batches
    assert not listed.headers
    assert not listed.reply_to


def _parsed(data: bytes) -> EmailMessage:
    return message_from_bytes(data, policy=default)


@pytest.mark.parametrize("value", ["{{ cell }}", "{% if cell %}{{ cell }}{% endif %}"])
async def test_a_row_with_a_wrong_header_is_rejected_at_intake(
    scheduler: Scheduler, sender: sender_pb2.Sender, value: str
) -> None:
    cells = '"x\r\nBcc: eve@evil.example"', "x" * 1_000, '"<https://a.example/ b>"'
    rows = "".join(f"b@b.org,{cell}\n" for cell in cells)
    answer = await scheduler.schedule(
        sender,
        f"email,cell\na@b.org,<https://a.example>\n{rows}",
        headers=[batch_pb2.MailHeader(name="List-Unsubscribe", value=value)],
    )
    assert answer.batch.accepted_count == 1
    assert [(each.row_number, each.column, each.reason) for each in answer.rejections] == [
        (2, "cell", "HEADER_INVALID"),
        (3, "cell", "HEADER_TOO_LONG"),
        (4, "cell", "HEADER_INVALID"),
    ]


async def test_a_wrong_option_is_named_by_its_field(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    wrong: list[tuple[dict[str, Any], str, str]] = [
        ({"headers": [ONE_CLICK]}, "HEADER_INVALID", "options.headers"),
        (
            {"headers": [batch_pb2.MailHeader(name="Bcc", value="x")]},
            "HEADER_INVALID",
            "options.headers[0].name",
        ),
        (
            {"headers": [batch_pb2.MailHeader(name="X-A", value="{{ x")]},
            "TEMPLATE_INVALID",
            "options.headers[0].value",
        ),
        (
            {"headers": [batch_pb2.MailHeader(name=f"X-{n}", value="v") for n in range(21)]},
            "TOO_MANY_HEADERS",
            "options.headers",
        ),
        ({"reply_to": "nobody"}, "REPLY_TO_INVALID", "options.reply_to"),
        ({"name_column": "nick"}, "NAME_COLUMN_INVALID", "options.name_column"),
        ({"external_id": "x\ny"}, "EXTERNAL_ID_INVALID", "options.external_id"),
        ({"labels": {"Campaign": "x"}}, "LABELS_INVALID", "options.labels"),
        ({"labels": {"campaign": ""}}, "LABELS_INVALID", "options.labels"),
        (
            {"external_id_column": "no"},
            "EXTERNAL_ID_COLUMN_INVALID",
            "options.external_id_column",
        ),
        ({"label_columns": ["no"]}, "LABEL_COLUMNS_INVALID", "options.label_columns"),
        ({"label_columns": ["Ärger"]}, "LABEL_COLUMNS_INVALID", "options.label_columns[0]"),
    ]
    for options, reason, field in wrong:
        refused = await refusal_of(scheduler.schedule(sender, CSV, **options))
        assert (refused.code, refused.reason) == ("INVALID_ARGUMENT", reason), options
        assert list(refused.violations) == [field]
    assert not scheduler.value("SELECT count(*) FROM batches")


async def test_a_costly_header_is_refused_as_other_templates_are(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    costly = "{% for i in (1..1000) %}{% for j in (1..1000) %}{{ region }}{% endfor %}{% endfor %}"
    answer = await refusal_of(
        scheduler.schedule(sender, CSV, headers=[batch_pb2.MailHeader(name="X-A", value=costly)])
    )
    assert answer.reason == "NO_ROW_ACCEPTED"
    assert "TEMPLATE_LIMIT: in options.headers[0].value" in str(answer.violations)


@pytest.mark.parametrize("spread", [False, True])
async def test_jobs_have_the_ids_and_labels_of_their_rows(
    scheduler: Scheduler, sender: sender_pb2.Sender, spread: bool
) -> None:
    more = {"spread_until": {"seconds": 4_000_000_000}} if spread else {}
    answer = await scheduler.schedule(
        sender,
        CSV,
        external_id="spring",
        labels={"campaign": "Frühling", "region": "everywhere"},
        external_id_column="customer",
        label_columns=["Region"],
        **more,
    )
    assert answer.batch.external_id == "spring"
    assert dict(answer.batch.labels) == {"campaign": "Frühling", "region": "everywhere"}
    [ann] = await found(scheduler, 'external_id = "C-1"')
    assert (ann.recipient, ann.external_id) == ("ann@b.org", "C-1")
    assert dict(ann.labels) == {"campaign": "Frühling", "region": "north"}
    [bob] = await found(scheduler, "external_id = C-2")
    assert dict(bob.labels) == {"campaign": "Frühling", "region": "everywhere"}
    read = await scheduler.jobs.GetEmailJob(GetEmailJobRequest(email_job_id=bob.email_job_id))
    assert read == bob


async def test_filters_find_jobs_and_batches_by_ids_and_labels(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    other = await scheduler.sender("eve")
    rows = (
        {"email": "a@b.org", "external_id": "1", "labels": {"kind": "news"}},
        {"email": "b@b.org", "external_id": "2"},
        {"email": "c@b.org", "labels": {"kind": 'it"s \\ odd'}},
    )
    await by_rows(scheduler, sender, *rows, external_id="first", labels={"kind": "bill"})
    await by_rows(scheduler, sender, {"email": "d@b.org"}, external_id="second")
    await by_rows(scheduler, other, {"email": "e@b.org", "external_id": "1"}, external_id="first")

    assert await rows_of(scheduler, "external_id = 1") == ["a@b.org"]
    assert await rows_of(scheduler, "external_id = 1", "eve") == ["e@b.org"]
    assert await rows_of(scheduler, "external_id = 1 AND NOT labels.kind = news") == []
    assert await rows_of(scheduler, "external_id != 1") == ["b@b.org", "c@b.org", "d@b.org"]
    assert await rows_of(scheduler, "external_id = 1 OR external_id = 2") == ["a@b.org", "b@b.org"]
    assert await rows_of(scheduler, "labels.kind = news") == ["a@b.org"]
    assert await rows_of(scheduler, "labels.kind = bill") == ["b@b.org"]
    assert await rows_of(scheduler, "labels.kind = 'it\"s \\\\ odd'") == ["c@b.org"]
    assert await rows_of(scheduler, "labels.kind != bill") == ["a@b.org", "c@b.org", "d@b.org"]
    assert await rows_of(scheduler, "labels.kind = bill", "eve") == []
    # Without the user, by the sender alone.
    [narrow] = await found(scheduler, "external_id = 1", "", sender_id=other.sender_id)
    assert narrow.recipient == "e@b.org"

    async def batches(filter_: str) -> list[str]:
        request = ListBatchesRequest(user_id="ann", filter=filter_)
        listed = await scheduler.batches.ListBatches(request)
        return [batch.external_id for batch in listed.batches]

    assert await batches("external_id = first") == ["first"]
    assert await batches("labels.kind = bill") == ["first"]
    assert await batches("labels.kind != bill") == ["second"]
    wrong = ListEmailJobsRequest(user_id="ann", filter="labels.Kind = x")
    assert (await refusal_of(scheduler.jobs.ListEmailJobs(wrong))).reason == "FILTER_INVALID"
    wrong.filter = "labels = x"
    assert "labels.KEY" in (await refusal_of(scheduler.jobs.ListEmailJobs(wrong))).message


async def test_sets_of_jobs_are_changed_by_ids_and_labels(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    rows = [{"email": f"{n}@b.org", "external_id": str(n // 2)} for n in range(6)]
    await by_rows(scheduler, sender, *rows, labels={"kind": "bill"})
    cancelled = await scheduler.jobs.CancelEmailJobs(
        CancelEmailJobsRequest(user_id="ann", filter="external_id = 1")
    )
    assert cancelled.cancelled_count == 2
    moved = await scheduler.jobs.RescheduleEmailJobs(
        RescheduleEmailJobsRequest(
            user_id="ann",
            filter="labels.kind = bill",
            schedule_time=Timestamp(seconds=4_000_000_000),
        )
    )
    assert moved.rescheduled_count == 4
    retried = await scheduler.jobs.RetryEmailJobs(
        RetryEmailJobsRequest(user_id="ann", filter="labels.kind = bill", validate_only=True)
    )
    assert retried.retried_count == 0
    others = CancelEmailJobsRequest(user_id="eve", filter="labels.kind = bill")
    assert (await scheduler.jobs.CancelEmailJobs(others)).cancelled_count == 0
    assert await rows_of(scheduler, "state = CANCELLED") == ["2@b.org", "3@b.org"]


async def test_a_search_for_a_repeated_id_reads_few_rows(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    rows = [{"email": f"{n}@b.org", "external_id": "same"} for n in range(25)]
    await by_rows(scheduler, sender, *rows[:20])
    await by_rows(scheduler, sender, *rows[20:])
    for descending in (False, True):
        tree = FieldTest("external_id", "=", "same")
        which = JobFilter("ann", tree, descending)
        engine = create_engine(scheduler.settings)
        jobs: list[Any] = []
        parts = 0
        async with engine.connect() as connection:
            position: Any = which.start
            while position is not None:
                walked = await walk_jobs(connection, which, position, 100, rows=10)
                jobs += walked.found
                position, parts = walked.reached, parts + 1
        await engine.dispose()
        assert parts == 3
        assert jobs == sorted(set(jobs), reverse=descending)
        assert len(jobs) == 25


async def test_a_wrong_id_or_label_of_a_row_rejects_the_row(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"external_id": "x" * 129}, "EXTERNAL_ID_INVALID"),
        ({"external_id": "x\0"}, "EXTERNAL_ID_INVALID"),
        ({"labels": {"kind": "x" * 129}}, "LABELS_INVALID"),
        ({"labels": {"Kind": "x"}}, "LABELS_INVALID"),
        ({"labels": {f"k{n}": "x" for n in range(17)}}, "LABELS_INVALID"),
    ]
    answer = await by_rows(
        scheduler, sender, *(row for row, _ in wrong), {"external_id": "x" * 128}
    )
    assert [each.reason for each in answer.rejections] == [reason for _, reason in wrong]
    assert answer.batch.accepted_count == 1
    csv = f"email,id\na@b.org,{'x' * 129}\nb@b.org,1\n"
    answer = await scheduler.schedule(sender, csv, external_id_column="id")
    [rejection] = answer.rejections
    assert (rejection.column, rejection.reason) == ("id", "EXTERNAL_ID_INVALID")


async def test_a_request_id_is_refused_with_other_ids_or_labels(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    row = {"external_id": "1", "labels": {"a": "1", "b": "2"}}
    first = await by_rows(scheduler, sender, row, request_id="same", labels={"c": "3"})
    again = await by_rows(scheduler, sender, row, request_id="same", labels={"c": "3"})
    assert again.replayed
    assert again.batch.batch_id == first.batch.batch_id
    others: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"external_id": "2"}, {}),
        (row, {"labels": {"c": "4"}}),
        (row, {"reply_to": "a@b.org"}),
    ]
    for other, options in others:
        call = by_rows(
            scheduler, sender, other, request_id="same", **{"labels": {"c": "3"}, **options}
        )
        assert (await refusal_of(call)).reason == "REQUEST_ID_REUSED"


async def test_the_ids_labels_and_headers_of_an_erased_recipient_are_erased(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    row = {
        "email": "ann@b.org",
        "columns": {"name": "Ann Secret"},
        "external_id": "ann-secret",
        "labels": {"who": "ann-secret"},
    }
    single = await by_rows(
        scheduler,
        sender,
        row,
        name_column="name",
        reply_to="ann-secret@b.org",
        headers=[batch_pb2.MailHeader(name="X-Who", value="ann-secret")],
        external_id="ann-secret",
        labels={"who": "ann-secret"},
    )
    await scheduler.batches.CancelBatch(
        CancelBatchRequest(batch_id=single.batch.batch_id, request_id="cancel")
    )
    await by_rows(scheduler, sender, row, {"external_id": "other"}, labels={"kind": "news"})
    await scheduler.suppressions.EraseRecipient(
        EraseRecipientRequest(user_id="ann", email="ann@b.org")
    )
    for table in ("email_jobs", "batches", "change_requests", "audit_events"):
        for (text,) in scheduler.rows(f"SELECT lower(t::text) FROM {table} t"):
            assert "secret" not in text
            assert b"secret".hex() not in text
    assert await found(scheduler, "external_id = ann-secret") == []
    assert await rows_of(scheduler, "labels.kind = news") == ["", "a@b.org"]
