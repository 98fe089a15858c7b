"""SendTestEmail: one mail on the way of all mail, marked and counted."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from email import message_from_bytes

import pytest_asyncio
from google.protobuf.duration_pb2 import Duration
from outbox.v1 import batch_pb2, sender_pb2
from outbox.v1.batch_service_pb2 import (
    GetBatchRequest,
    SendTestEmailRequest,
    SendTestEmailResponse,
)
from outbox.v1.email_job_pb2 import EMAIL_JOB_STATE_SCHEDULED, EMAIL_JOB_STATE_SENT
from outbox.v1.email_job_service_pb2 import (
    GetEmailJobRequest,
    ListEmailJobsRequest,
    RenderEmailJobRequest,
)
from outbox.v1.suppression_pb2 import Suppression
from outbox.v1.suppression_service_pb2 import CreateSuppressionRequest

from outbox_server.deploy.embedded.inbox import Inbox
from tests.commands import outbox
from tests.dispatchers import options as dispatcher_options
from tests.dispatchers import running, settings_of
from tests.eventually import eventually
from tests.scheduler_stack import Scheduler, options_for, refusal_of, running_scheduler

LATER = datetime.now(UTC) + timedelta(days=3)


@pytest_asyncio.fixture
async def scheduler(database_url: str, redis_url: str) -> AsyncIterator[Scheduler]:
    settings = {"min_gap": "0s", "user_waiting_jobs": 3}
    async with running_scheduler(database_url, redis_url, **settings) as running:
        yield running


@pytest_asyncio.fixture
async def sender(scheduler: Scheduler) -> sender_pb2.Sender:
    return await scheduler.sender(hourly_limit=2)


async def send(
    scheduler: Scheduler,
    options: batch_pb2.BatchOptions,
    email: str = "me@b.org",
    **columns: str,
) -> SendTestEmailResponse:
    recipient = batch_pb2.Recipient(email=email, columns=columns)
    request = SendTestEmailRequest(options=options, recipient=recipient)
    return await scheduler.batches.SendTestEmail(request)


async def test_a_test_mail_is_sent_marked_and_counted_by_the_limits(
    scheduler: Scheduler, sender: sender_pb2.Sender, inbox: Inbox, database_url: str, redis_url: str
) -> None:
    plain = options_for(sender, subject="Hi {{ name }}", body="Dear {{ name }}")
    liquid = options_for(sender, body="{% if name %}Dear {{ name }}{% endif %}", html="<p>x</p>")
    liquid.schedule_time.FromDatetime(LATER)
    liquid.spacing.CopyFrom(Duration(seconds=60))
    liquid.email_column, liquid.skip_lines = "other", 3
    liquid.external_id_column = "id"
    liquid.label_columns.append("region")
    first = await send(scheduler, plain, name="Ann", schedule_time=LATER.isoformat())
    assert first.email_job.test
    assert first.email_job.state == EMAIL_JOB_STATE_SCHEDULED
    assert first.HasField("estimated_send_time")
    second = await send(scheduler, liquid, name="Ann")
    # The hourly limit is 2, so the third one waits.
    third = await send(scheduler, options_for(sender), "third@b.org")
    refusal = await refusal_of(send(scheduler, options_for(sender)))
    assert refusal.reason == "USER_WAITING_JOBS_EXCEEDED"

    again = await send(scheduler, plain, name="Ann", schedule_time=LATER.isoformat())
    assert (again.replayed, again.email_job.email_job_id) == (True, first.email_job.email_job_id)
    shown = await scheduler.jobs.RenderEmailJob(
        RenderEmailJobRequest(email_job_id=first.email_job.email_job_id)
    )
    assert b"\r\nX-Outbox-Test: true\r\n" in shown.message

    async with running(settings_of(dispatcher_options(database_url, redis_url, inbox.url))):
        await eventually(lambda: len(inbox.mails) == 2)
        waiting = await eventually(lambda: _waiting(scheduler))
    assert waiting == [third.email_job.email_job_id]
    assert len(inbox.mails) == 2
    for answer in (first, second):
        job = await scheduler.jobs.GetEmailJob(
            GetEmailJobRequest(email_job_id=answer.email_job.email_job_id)
        )
        assert (job.state, job.test) == (EMAIL_JOB_STATE_SENT, True)
        (mail,) = [each for each in inbox.mails if each.message_id == job.message_id]
        parsed = message_from_bytes((inbox.maildir / "new" / mail.file).read_bytes())
        assert parsed["X-Outbox-Test"] == "true"
        assert parsed["Subject"] == ("Hi Ann" if answer is first else "Hello")
    batch = await scheduler.batches.GetBatch(GetBatchRequest(batch_id=third.email_job.batch_id))
    assert (batch.test, batch.accepted_count) == (True, 1)


async def _waiting(scheduler: Scheduler) -> list[str]:
    """Return the one job that waits, once the others have been sent."""
    request = ListEmailJobsRequest(user_id="ann", state=EMAIL_JOB_STATE_SCHEDULED)
    found = (await scheduler.jobs.ListEmailJobs(request)).email_jobs
    return [job.email_job_id for job in found] if len(found) == 1 else []


async def test_a_test_mail_keeps_the_id_and_the_labels_of_its_recipient(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    recipient = batch_pb2.Recipient(email="me@b.org", external_id="7", labels={"region": "north"})
    request = SendTestEmailRequest(options=options_for(sender), recipient=recipient)
    job = (await scheduler.batches.SendTestEmail(request)).email_job
    assert (job.external_id, dict(job.labels)) == ("7", {"region": "north"})


async def test_only_test_mail_is_marked_as_a_test(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    answer = await scheduler.schedule(sender)
    assert not answer.batch.test
    request = ListEmailJobsRequest(batch_id=answer.batch.batch_id)
    (job,) = (await scheduler.jobs.ListEmailJobs(request)).email_jobs
    assert not job.test
    shown = await scheduler.jobs.RenderEmailJob(
        RenderEmailJobRequest(email_job_id=job.email_job_id)
    )
    assert b"X-Outbox-Test" not in shown.message


async def test_a_test_mail_that_cannot_be_sent_stores_nothing(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    await scheduler.suppressions.CreateSuppression(
        CreateSuppressionRequest(user_id="ann", suppression=Suppression(email="gone@b.org"))
    )
    gone = await refusal_of(send(scheduler, options_for(sender), "gone@b.org"))
    assert (gone.code, gone.reason) == ("FAILED_PRECONDITION", "RECIPIENT_SUPPRESSED")
    bad = await refusal_of(send(scheduler, options_for(sender), "nobody"))
    assert bad.reason == "ROW_REJECTED"
    assert set(bad.violations) == {"recipient.email"}
    assert bad.message.startswith("recipient.email: ADDRESS_INVALID")
    costly = options_for(sender, body="{% if a > 1 %}x{% endif %}")
    empty = await refusal_of(send(scheduler, costly, a=""))
    assert empty.reason == "ROW_REJECTED"
    assert "TEMPLATE_RENDER_FAILED" in empty.message
    missing = await refusal_of(send(scheduler, options_for(sender, body="{{ name }}")))
    assert missing.reason in ("ROW_REJECTED", "COLUMN_MISSING")
    assert scheduler.value("SELECT count(*) FROM batches") == 0
    # A test has a request_id of its own.
    options = options_for(sender)
    await send(scheduler, options)
    real = await refusal_of(
        scheduler.schedule(sender, "email\nme@b.org\n", request_id=options.request_id)
    )
    assert real.reason == "REQUEST_ID_REUSED"


async def test_the_command_line_sends_a_test(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    words = ("senders", "test", sender.sender_id, "--recipient", "me@b.org")
    content = ["--body", "Dear {{ name }}", "--column", "name=Ann=a"]
    content += ("--reply-to", "Team <team@b.org>", "--header", "X-Kind: {{ name }}")
    content += ("--name-column", "name", "--request-id", "first")
    sent = await outbox(scheduler, *words, *content)
    assert sent.exit_code == 0, sent.stderr
    job = str(scheduler.value("SELECT id FROM email_jobs"))
    assert f"outbox jobs explain {job}" in sent.stderr
    mail = (await outbox(scheduler, "jobs", "render", job)).stdout
    assert "Dear Ann=a" in mail
    assert "Subject: A test of Outbox" in mail
    assert "Reply-To: Team <team@b.org>" in mail
    assert "X-Kind: Ann=a" in mail
    assert 'To: "Ann=a" <me@b.org>' in mail or "To: Ann=a <me@b.org>" in mail
    await outbox(scheduler, *words, *content)
    assert scheduler.value("SELECT count(*) FROM email_jobs") == 1
    wrong = await outbox(scheduler, *words, "--column", "name")
    assert wrong.exit_code == 2
