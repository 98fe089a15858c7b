"""PreviewBatch and RenderEmailJob show the mail that a mail server then receives."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest_asyncio
from google.protobuf.duration_pb2 import Duration
from outbox.v1 import batch_pb2, sender_pb2
from outbox.v1.batch_service_pb2 import (
    ROW_OMISSION_DUPLICATE,
    ROW_OMISSION_NO_ROW,
    ROW_OMISSION_SUPPRESSED,
    PreviewBatchRequest,
    PreviewBatchResponse,
)
from outbox.v1.email_job_service_pb2 import GetEmailJobRequest, RenderEmailJobRequest
from outbox.v1.suppression_pb2 import Suppression
from outbox.v1.suppression_service_pb2 import CreateSuppressionRequest, EraseRecipientRequest

from outbox_server.deploy.embedded.inbox import Inbox
from tests.commands import outbox
from tests.dispatchers import options as dispatcher_options
from tests.dispatchers import running, settings_of
from tests.eventually import eventually
from tests.fingerprint import Fingerprint
from tests.scheduler_stack import Scheduler, options_for, refusal_of, running_scheduler

LONG: Final = "word " * 400 + "unbroken" * 200
CSV: Final = (
    "email,Name,points,time_zone,schedule_time,note\n"
    f'ann@b.org,Ann,120,Europe/Berlin,2026-01-01T10:00,"{LONG}"\n'
    'zoe@b.org,Zoë & <Co>,7,,,"two\nlines\n.dot"\n'
    "jörg@b.org,Jörg 💌,0,,,\n"
)
# The kinds of mails: options of a batch.
KINDS: Final[dict[str, dict[str, Any]]] = {
    "plain": {"body": "Dear {{ name }},\n{{ note }}"},
    "html": {"body": None, "html": "<p>{{ name }}</p><p>{{ note }}</p>"},
    "both": {"body": "{{ note }}", "html": "<b>{{ name }}</b>", "subject": "Größe {{ name }}"},
    "liquid": {
        "subject": "{{ name | upcase }} has {{ points | default: 'no' }} points",
        "body": "{% if points > 100 %}gold{% else %}blue{% endif %} {{ time_zone }}"
        " {{ schedule_time }} {{ now | date: '%Y' }} {{ today | date: '%Y' }}",
        "html": "{% for n in (1..200) %}<i>{{ n }} {{ name }}</i>{% endfor %}",
    },
    "headers": {
        "reply_to": "Help {{ points }} <help+{{ points }}@b.org>",
        "name_column": "Name",
        "headers": [
            {"name": "List-Unsubscribe", "value": "<https://b.org/u?p={{ points }}>"},
            {"name": "List-Unsubscribe-Post", "value": "List-Unsubscribe=One-Click"},
            {"name": "X-Name", "value": "{{ name }}"},
        ],
    },
    "rows": {"subject": None, "body": None},
}
OF_ROWS: Final = (
    "email,subject,body,html\na@b.org,S é 1,Text,\nc@b.org,S2,,<p>{{ no template }}</p>\n"
)


@pytest_asyncio.fixture
async def scheduler(database_url: str, redis_url: str) -> AsyncIterator[Scheduler]:
    # The workers have a low priority: on a busy machine, a budget takes many times as long.
    settings = {"min_gap": "0s", "template_budget": "300ms"}
    async with running_scheduler(database_url, redis_url, **settings) as running:
        yield running


@pytest_asyncio.fixture
async def sender(scheduler: Scheduler) -> sender_pb2.Sender:
    return await scheduler.sender(display_name="Zoë's shop", min_gap=Duration())


async def preview(
    scheduler: Scheduler,
    options: batch_pb2.BatchOptions,
    csv: str | bytes,
    *numbers: int,
) -> PreviewBatchResponse:
    content = csv.encode() if isinstance(csv, str) else csv
    return await scheduler.batches.PreviewBatch(
        PreviewBatchRequest(options=options, csv=content, row_numbers=numbers)
    )


def without_changing(mail: bytes, *, message_id: bool = True) -> bytes:
    """Return a mail without its date, its random boundary and, on request, its Message-ID."""
    mail = re.sub(rb"(?m)^Date: .*\r\n", b"", mail, count=1)
    if not message_id:
        mail, found = re.subn(rb"(?m)^Message-ID: .*\r\n", b"", mail, count=1)
        assert found == 1
    boundary = re.search(rb'boundary="([^"]+)"', mail)
    return mail.replace(boundary[1], b"BOUNDARY") if boundary else mail


async def test_what_is_shown_is_what_a_mail_server_receives(
    scheduler: Scheduler, sender: sender_pb2.Sender, inbox: Inbox, database_url: str, redis_url: str
) -> None:
    previews: dict[str, bytes] = {}
    rendered: dict[str, bytes] = {}
    for kind, fields in KINDS.items():
        options = options_for(sender, **fields)
        csv = OF_ROWS if kind == "rows" else CSV
        shown = await preview(scheduler, options, csv, 1, 2, 3)
        await scheduler.schedule(sender, csv, **(fields | {"request_id": options.request_id}))
        rows = scheduler.rows(
            "SELECT email_jobs.id, row_number FROM email_jobs JOIN batches ON batches.id = batch_id"
            " WHERE request_id = %s",
            options.request_id,
        )
        assert len(rows) == (2 if kind == "rows" else 3)
        mails = {row.row_number: row.mail for row in shown.rows if row.HasField("mail")}
        assert mails.keys() == {number for _, number in rows}
        for job, number in rows:
            asked = RenderEmailJobRequest(email_job_id=str(job))
            mail = await scheduler.jobs.RenderEmailJob(asked)
            message_id = (
                await scheduler.jobs.GetEmailJob(GetEmailJobRequest(email_job_id=str(job)))
            ).message_id
            previews[message_id] = without_changing(mails[number].message, message_id=False)
            rendered[message_id] = without_changing(mail.message)
            assert mail.recipient == mails[number].recipient
            assert mail.smtputf8 == mails[number].smtputf8
            assert mail.sender == "news@example.com"

    settings = settings_of(dispatcher_options(database_url, redis_url, inbox.url))
    async with running(settings):
        await eventually(lambda: len(inbox.mails) == len(rendered))
    received = {
        mail.message_id: (inbox.maildir / "new" / mail.file).read_bytes() for mail in inbox.mails
    }
    assert {key: without_changing(mail) for key, mail in received.items()} == rendered
    assert {
        key: without_changing(mail, message_id=False) for key, mail in received.items()
    } == previews
    assert any(b"gold Europe/Berlin" in mail for mail in received.values())


async def test_a_preview_says_why_a_row_becomes_no_mail_and_stores_nothing(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    await scheduler.suppressions.CreateSuppression(
        CreateSuppressionRequest(user_id="ann", suppression=Suppression(email="gone@b.org"))
    )
    csv = "email,a\ngone@b.org,1\nbad,2\nann@b.org,3\n\nANN@b.org,5\nzoe@b.org,\n"
    options = options_for(sender, body="{% if a > 2 %}{{ a }}{% endif %}", request_id=None)
    # The first preview of an installation makes its id.
    await preview(scheduler, options, csv)
    tables = Fingerprint(scheduler)
    before = await tables.take()
    first = await preview(scheduler, options, csv)
    assert [(row.row_number, row.mail.recipient) for row in first.rows] == [(3, "ann@b.org")]
    assert first.email_column == "email"
    rows = (await preview(scheduler, options, csv, 9, 1, 2, 3, 4, 5, 6, 3)).rows
    assert [row.row_number for row in rows] == [1, 2, 3, 4, 5, 6, 9]
    assert rows[0].omission == ROW_OMISSION_SUPPRESSED
    assert rows[1].rejection.reason == "ADDRESS_INVALID"
    assert rows[2].mail.message.endswith(b"\r\n\r\n3\r\n")
    assert [row.omission for row in (rows[3], rows[6])] == [ROW_OMISSION_NO_ROW] * 2
    assert rows[4].omission == ROW_OMISSION_DUPLICATE
    assert rows[5].rejection.reason == "TEMPLATE_RENDER_FAILED"
    options.duplicates = batch_pb2.DUPLICATE_POLICY_KEEP_ALL
    assert (await preview(scheduler, options, csv, 5)).rows[0].mail.recipient == "ANN@b.org"
    only = await preview(scheduler, options, "email,a\ngone@b.org,1\n")
    assert only.rows[0].omission == ROW_OMISSION_SUPPRESSED
    assert await tables.take() == before


async def test_rows_can_be_given_as_messages(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    rows = [batch_pb2.Recipient(email=f"{n}@b.org", columns={"Name": str(n)}) for n in range(3)]
    request = PreviewBatchRequest(
        options=options_for(sender, body="Dear {{ name }}"),
        recipients=batch_pb2.Recipients(rows=rows),
        row_numbers=[2],
    )
    answer = await scheduler.batches.PreviewBatch(request)
    assert answer.rows[0].mail.message.endswith(b"Dear 1\r\n")


async def test_previews_that_are_wrong_are_refused(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    costly = (
        "{% for i in (1..1000) %}{% for j in (1..1000) %}{{ a | upcase }}{% endfor %}{% endfor %}"
    )
    large = "x" * (4 * 1024 * 1024 - 100)
    right = "email,a\nann@b.org,1\n"
    for numbers, csv, fields, reason in (
        ([0], right, {}, "ROW_NUMBER_INVALID"),
        ([-5], right, {}, "ROW_NUMBER_INVALID"),
        (list(range(1, 22)), right, {}, "TOO_MANY_ENTRIES"),
        ([], "", {}, "CSV_EMPTY"),
        ([], "email\n", {}, "CSV_NO_ROWS"),
        ([], "email\nbad\n", {}, "NO_ROW_ACCEPTED"),
        ([], right, {"body": "{{ a"}, "TEMPLATE_INVALID"),
        ([], right, {"sender_id": "99"}, "SENDER_NOT_FOUND"),
        ([], f"email,a\nann@b.org,{large}\n", {"body": "{{ a }}"}, "MAIL_TOO_LARGE_TO_SHOW"),
    ):
        refusal = await refusal_of(preview(scheduler, options_for(sender, **fields), csv, *numbers))
        assert refusal.reason == reason
    rows = (await preview(scheduler, options_for(sender, body=costly), right, 1)).rows
    assert rows[0].rejection.reason in ("TEMPLATE_TOO_COSTLY", "TEMPLATE_LIMIT")
    no_payload = PreviewBatchRequest(options=options_for(sender))
    refusal = await refusal_of(scheduler.batches.PreviewBatch(no_payload))
    assert refusal.reason == "PAYLOAD_REQUIRED"


async def test_a_job_whose_mail_cannot_be_built_is_not_rendered(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    async def refused(csv: str, body: str = "", value: str = "") -> tuple[str, str]:
        await scheduler.schedule(sender, csv, body="{{ a }}")
        job, batch = scheduler.rows("SELECT id, batch_id FROM email_jobs ORDER BY id DESC LIMIT 1")[
            0
        ]
        if body:
            # As a batch of an older release, whose rows were not rendered at intake.
            scheduler.execute("UPDATE batches SET body = %s WHERE id = %s", body, batch)
        if value:
            scheduler.execute("UPDATE email_jobs SET variables = %s WHERE id = %s", value, job)
        asked = RenderEmailJobRequest(email_job_id=str(job))
        refusal = await refusal_of(scheduler.jobs.RenderEmailJob(asked))
        assert refusal.code == "FAILED_PRECONDITION"
        return refusal.reason, refusal.metadata.get("cause", "")

    row = "email,a\nann@b.org,x\n"
    assert await refused(row, "{% if a > 1 %}{% endif %}", '[""]') == (
        "MAIL_NOT_BUILT",
        "TEMPLATE_RENDER_FAILED",
    )
    costly = (
        '{% assign l = a | split: "," %}{% for i in (1..1000) %}'
        "{% assign m = l | sort | reverse | uniq %}{% endfor %}x"
    )
    found = await refused(row, costly, json.dumps([",".join(f"item{n}" for n in range(900))]))
    assert found == ("MAIL_NOT_BUILT", "TEMPLATE_TOO_COSTLY")
    await scheduler.schedule(sender, "email,a\nerased@b.org,x\n", body="{{ a }}")
    job = scheduler.value("SELECT id FROM email_jobs WHERE recipient = 'erased@b.org'")
    await scheduler.suppressions.EraseRecipient(
        EraseRecipientRequest(user_id="ann", email="erased@b.org")
    )
    refusal = await refusal_of(
        scheduler.jobs.RenderEmailJob(RenderEmailJobRequest(email_job_id=str(job)))
    )
    assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "RECIPIENT_ERASED")


async def test_the_command_line_writes_the_bytes_of_a_mail(
    scheduler: Scheduler, sender: sender_pb2.Sender, tmp_path: Path
) -> None:
    file = tmp_path / "people.csv"
    file.write_text("email,name\nann@b.org,Ann\nANN@b.org,Ann\n")
    content = ("--subject", "Hi", "--body", "Dear {{ name }}")
    words = ("schedule", str(file), "--sender", sender.sender_id, *content)
    shown = await outbox(scheduler, *words, "--preview", "0")
    assert shown.exit_code == 0, shown.stderr
    assert "row 1, to ann@b.org" in shown.stderr
    assert shown.stdout.endswith("\n\nDear Ann\n") or shown.stdout.endswith("Dear Ann\r\n")
    left_out = await outbox(scheduler, *words, "--preview", "2")
    assert left_out.exit_code == 1
    assert "row 2 becomes no mail: an earlier row has the same address" in left_out.stderr
    several = await outbox(scheduler, *words, "--preview", "1", "--preview", "2", "--preview", "3")
    assert several.exit_code == 1
    assert [line[:5] for line in several.stderr.splitlines()] == ["row 1", "row 2", "row 3"]
    assert several.stdout.count("Dear Ann") == 1
    file.write_text("email,name\nann@b.org,Ann\nbob@b.org,Bob\n")
    both = await outbox(scheduler, *words, "--preview", "2", "--preview", "1")
    assert both.exit_code == 0, both.stderr
    assert both.stdout.index("Dear Ann") < both.stdout.index("Dear Bob")
    for rows, problem in (
        (("-1",), "--preview: must be 0, or a row's number from 1 (got -1)"),
        (("0", "1"), "--preview 0 shows one mail"),
        (("1",) * 21, "at most 20 rows may be given (got 21)"),
    ):
        wrong = await outbox(scheduler, *words, *(f"--preview={row}" for row in rows))
        assert wrong.exit_code == 2
        assert problem in " ".join(wrong.stderr.replace("│", " ").split())
    file.write_text("email,name\nann@b.org,Ann\nANN@b.org,Ann\n")
    assert scheduler.value("SELECT count(*) FROM batches") == 0
    assert (await outbox(scheduler, *words)).exit_code == 0
    job = str(scheduler.value("SELECT id FROM email_jobs"))
    rendered = await outbox(scheduler, "jobs", "render", job)
    assert "Subject: Hi" in rendered.stdout
    as_json = await outbox(scheduler, "jobs", "render", job, "-o", "json")
    assert json.loads(as_json.stdout)["recipient"] == "ann@b.org"
