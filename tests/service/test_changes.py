"""Calls that change something: once per request id, only what was read, and with an audit event."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import grpc
import pytest_asyncio
from google.api.field_behavior_pb2 import FieldBehavior, field_behavior
from google.protobuf import json_format
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from outbox.v1 import (
    audit_service_pb2_grpc,
    batch_pb2,
    batch_service_pb2,
    email_job_service_pb2,
    sender_pb2,
    suppression_service_pb2,
    user_service_pb2,
)
from outbox.v1.audit_pb2 import AuditEvent
from outbox.v1.audit_service_pb2 import ListAuditEventsRequest
from outbox.v1.sender_service_pb2 import (
    CreateSenderRequest,
    DeleteSenderRequest,
    GetSenderRequest,
    PauseSenderRequest,
    ResumeSenderRequest,
    UpdateSenderRequest,
)
from outbox.v1.suppression_pb2 import Suppression
from outbox.v1.user_pb2 import User, UserQuotas

from outbox_server.deploy.certificates import self_signed
from outbox_server.shared.secrets import generate_key
from outbox_server.shared.states import JobState
from tests.contract_methods import contract_methods
from tests.for_each import for_each_case
from tests.scheduler_stack import Scheduler, refusal_of, running_scheduler, stored
from tests.two_users import rivals

KEY: Final = generate_key()
NO_CHANGES: Final = {"VerifySender", "ForecastBatch", "PreviewBatch", "RenderEmailJob"}
_ids = itertools.count(1)


@pytest_asyncio.fixture
async def scheduler(database_url: str, redis_url: str) -> AsyncIterator[Scheduler]:
    async with running_scheduler(database_url, redis_url, encryption_keys=KEY) as running:
        yield running


def new_id() -> str:
    return f"change-{next(_ids)}"


def creation(request_id: str, **fields: Any) -> CreateSenderRequest:
    fields = {"email": "news@example.com", **fields}
    return CreateSenderRequest(
        user_id="ann", sender=sender_pb2.Sender(**fields), request_id=request_id
    )


async def events(scheduler: Scheduler, **which: Any) -> list[AuditEvent]:
    async with grpc.aio.insecure_channel(scheduler.address) as channel:
        stub = audit_service_pb2_grpc.AuditServiceStub(channel)
        answer = await stub.ListAuditEvents(ListAuditEventsRequest(**which))
        return list(answer.audit_events)


def values(event: AuditEvent) -> tuple[Any, Any]:
    """Return the values before and after; None if there are none."""
    before = json_format.MessageToDict(event.before) if event.HasField("before") else None
    after = json_format.MessageToDict(event.after) if event.HasField("after") else None
    return before, after


# Request ids ---------------------------------------------------------------------------------


def test_every_changing_method_has_the_three_fields_at_the_same_place() -> None:
    checked = 0
    for method in contract_methods():
        reads = method.name.startswith(
            ("Get", "List", "Watch", "Explain", "Query", "Audit", "Export")
        )
        if reads or method.name in NO_CHANGES:
            continue
        fields = method.input_type.fields_by_name
        wanted = {"request_id": 15, "identity": 16, "reason": 17}
        if "options" in fields:
            # The id of a batch is required, and belongs to the batch.
            ids = fields["options"].message_type.fields_by_name["request_id"]  # type: ignore[union-attr]
            assert FieldBehavior.REQUIRED in ids.GetOptions().Extensions[field_behavior]
            del wanted["request_id"]
        numbers = {name: fields[name].number for name in wanted}
        assert numbers == wanted, method.full_name
        checked += 1
    assert checked >= 35


async def test_calls_with_one_request_id_create_one_sender(scheduler: Scheduler) -> None:
    request = creation(new_id())
    first = await scheduler.senders.CreateSender(request)
    assert await scheduler.senders.CreateSender(request) == first
    assert scheduler.value("SELECT count(*) FROM senders") == 1

    # Also when the calls are made at the same time, and with another id.
    request = creation(new_id())
    made = await asyncio.gather(*(scheduler.senders.CreateSender(request) for _ in range(12)))
    assert {sender.sender_id for sender in made} == {made[0].sender_id} != {first.sender_id}
    assert scheduler.value("SELECT count(*) FROM senders") == 2


async def test_a_request_id_of_another_request_is_refused(scheduler: Scheduler) -> None:
    name = new_id()
    sender = await scheduler.senders.CreateSender(creation(name))
    for other in (
        scheduler.senders.CreateSender(creation(name, email="other@example.com")),
        scheduler.senders.PauseSender(
            PauseSenderRequest(sender_id=sender.sender_id, user_id="ann", request_id=name)
        ),
    ):
        refused = await refusal_of(other)
        assert (refused.code, refused.reason) == ("ALREADY_EXISTS", "REQUEST_ID_REUSED")
        assert refused.metadata["request_id"] == name
    assert scheduler.value("SELECT count(*) FROM senders") == 1
    # Each user has ids of its own.
    await scheduler.senders.CreateSender(
        CreateSenderRequest(
            user_id="bob", sender=sender_pb2.Sender(email="b@example.com"), request_id=name
        )
    )


async def test_a_refused_request_may_be_made_again_with_its_id(scheduler: Scheduler) -> None:
    name, sender = new_id(), await scheduler.sender()
    accepted = await scheduler.schedule(sender)
    request = DeleteSenderRequest(sender_id=sender.sender_id, request_id=name)
    assert (await refusal_of(scheduler.senders.DeleteSender(request))).reason == (
        "SENDER_HAS_OPEN_JOBS"
    )
    await scheduler.batches.CancelBatch(
        batch_service_pb2.CancelBatchRequest(batch_id=accepted.batch.batch_id)
    )
    await scheduler.senders.DeleteSender(request)
    # The sender exists no more, and the repeated call succeeds as the first one did.
    await scheduler.senders.DeleteSender(request)
    again = DeleteSenderRequest(sender_id=sender.sender_id, request_id=new_id())
    assert (await refusal_of(scheduler.senders.DeleteSender(again))).code == "NOT_FOUND"


async def test_a_repeated_call_changes_nothing_more(scheduler: Scheduler) -> None:
    sender = await scheduler.sender()
    pause = PauseSenderRequest(sender_id=sender.sender_id, request_id=new_id())
    paused = await scheduler.senders.PauseSender(pause)
    await scheduler.senders.ResumeSender(ResumeSenderRequest(sender_id=sender.sender_id))
    assert await scheduler.senders.PauseSender(pause) == paused
    now = await scheduler.senders.GetSender(GetSenderRequest(sender_id=sender.sender_id))
    assert now.state == sender_pb2.SENDER_STATE_ACTIVE

    accepted = await scheduler.schedule(sender, "email\na@b.org\nc@d.org\n")
    cancel = batch_service_pb2.CancelBatchRequest(
        batch_id=accepted.batch.batch_id, request_id=new_id()
    )
    cancelled = await scheduler.batches.CancelBatch(cancel)
    assert cancelled.cancelled_count == 2
    assert await scheduler.batches.CancelBatch(cancel) == cancelled

    accepted = await scheduler.schedule(sender, "email\na@b.org\nc@d.org\n")
    jobs = scheduler.rows(
        "UPDATE email_jobs SET state = %s, finished_at = now(), attempt = 1 WHERE batch_id = %s"
        " RETURNING id",
        JobState.FAILED,
        int(accepted.batch.batch_id),
    )
    retry = email_job_service_pb2.RetryEmailJobsRequest(
        email_job_ids=[str(job) for (job,) in jobs], user_id="ann", request_id=new_id()
    )
    retried = await scheduler.jobs.RetryEmailJobs(retry)
    assert retried.retried_count == 2
    scheduler.execute(
        "UPDATE email_jobs SET state = %s, finished_at = now(), attempt = 1", JobState.UNCERTAIN
    )
    assert await scheduler.jobs.RetryEmailJobs(retry) == retried
    resolve = email_job_service_pb2.ResolveEmailJobRequest(
        email_job_id=str(jobs[0][0]),
        resolution=email_job_service_pb2.UNCERTAIN_RESOLUTION_SENT,
        request_id=new_id(),
    )
    resolved = await scheduler.jobs.ResolveEmailJob(resolve)
    assert await scheduler.jobs.ResolveEmailJob(resolve) == resolved


async def test_a_delay_that_was_interrupted_is_not_made_twice(scheduler: Scheduler) -> None:
    batch = (await scheduler.schedule(await scheduler.sender())).batch.batch_id
    request = email_job_service_pb2.RescheduleEmailJobsRequest(
        batch_id=batch, delay=Duration(seconds=3600), request_id=new_id(), user_id="ann"
    )
    due = "SELECT scheduled_at FROM email_jobs"
    before = scheduler.value(due)
    calls = [scheduler.jobs.RescheduleEmailJobs(request) for _ in range(4)]
    first, *others = await asyncio.gather(*calls)
    assert others == [first] * 3
    assert first.rescheduled_count == 1
    assert await scheduler.jobs.RescheduleEmailJobs(request) == first
    assert scheduler.value(due) - before == timedelta(hours=1)
    # As if the process had died before it could store the answer.
    died = "UPDATE change_requests SET answer = NULL, created_at = now() - interval '10 s'"
    scheduler.execute(died)
    refused = await refusal_of(scheduler.jobs.RescheduleEmailJobs(request))
    assert (refused.code, refused.reason) == ("ABORTED", "CHANGE_INTERRUPTED")
    assert scheduler.value(due) - before == timedelta(hours=1)
    # One that may be made twice makes the rest.
    cancel = email_job_service_pb2.CancelEmailJobsRequest(
        batch_id=batch, request_id=new_id(), user_id="ann"
    )
    answers = [await scheduler.jobs.CancelEmailJobs(cancel) for _ in range(2)]
    assert [each.cancelled_count for each in answers] == [1, 1]
    scheduler.execute(died)
    answers = [await scheduler.jobs.CancelEmailJobs(cancel) for _ in range(2)]
    assert [each.cancelled_count for each in answers] == [0, 0]
    assert scheduler.value("SELECT count(*) FROM change_requests WHERE answer IS NULL") == 1


async def test_a_request_with_a_password_is_recognised_without_storing_it(
    scheduler: Scheduler,
) -> None:
    smtp = sender_pb2.SmtpEndpoint(host="mail.example.com", username="ann", password="pa55word")
    name = new_id()
    await scheduler.senders.CreateSender(creation(name, smtp=smtp))
    smtp.password = "another"
    refused = await refusal_of(scheduler.senders.CreateSender(creation(name, smtp=smtp)))
    assert refused.reason == "REQUEST_ID_REUSED"
    for table in ("change_requests", "audit_events"):
        assert "pa55word" not in str(scheduler.rows(f"SELECT * FROM {table}"))


async def test_certificates_of_an_answer_are_read_again_and_not_stored_with_it(
    scheduler: Scheduler, tmp_path: Path
) -> None:
    ca = self_signed(tmp_path).public.read_text()
    smtp = sender_pb2.SmtpEndpoint(host="mail.example.com", ca_certificates=ca)
    create = creation(new_id(), smtp=smtp)
    created = await scheduler.senders.CreateSender(create)
    pause = PauseSenderRequest(sender_id=created.sender_id, request_id=new_id())
    paused = await scheduler.senders.PauseSender(pause)
    assert created.smtp.ca_certificates == paused.smtp.ca_certificates == ca
    assert await scheduler.senders.CreateSender(create) == created
    assert await scheduler.senders.PauseSender(pause) == paused
    stored = (
        "SELECT count(*) FROM change_requests WHERE strpos(encode(answer, 'escape'), 'CERTI') > 0"
    )
    assert scheduler.value(stored) == 0
    # They are not those of then, if somebody has changed them.
    await scheduler.senders.DeleteSender(DeleteSenderRequest(sender_id=created.sender_id))
    created.smtp.ca_certificates = ""
    assert await scheduler.senders.CreateSender(create) == created


@for_each_case(
    "field text reason",
    [
        ("request_id", "x" * 129, "REQUEST_ID_INVALID"),
        ("request_id", "a\nb", "REQUEST_ID_INVALID"),
        ("identity", "x" * 201, "IDENTITY_INVALID"),
        ("identity", "a\x00b", "IDENTITY_INVALID"),
        ("reason", "x" * 501, "CHANGE_REASON_INVALID"),
        ("reason", "a\x1bb", "CHANGE_REASON_INVALID"),
    ],
)
async def test_a_text_about_a_change_is_bounded(
    scheduler: Scheduler, field: str, text: str, reason: str
) -> None:
    request = creation("")
    setattr(request, field, text)
    refused = await refusal_of(scheduler.senders.CreateSender(request))
    assert (refused.code, refused.reason) == ("INVALID_ARGUMENT", reason)
    assert field in refused.violations
    assert scheduler.value("SELECT count(*) FROM senders") == 0


async def test_an_audit_event_has_no_id_of_one_that_a_failover_has_lost(
    scheduler: Scheduler,
) -> None:
    await scheduler.sender()
    before = "SELECT max(id) FROM audit_events"
    lost = scheduler.value(before)
    # A replica that lagged has neither the event nor the last step of the sequence.
    scheduler.execute("DELETE FROM audit_events")
    await scheduler.define("ALTER SEQUENCE audit_events_id_seq RESTART")
    await scheduler.sender()
    (event,) = await events(scheduler)
    assert int(event.audit_event_id) > lost


async def test_a_change_of_what_was_changed_meanwhile_is_refused(scheduler: Scheduler) -> None:
    sender = await scheduler.sender()
    assert sender.etag
    update = UpdateSenderRequest(
        sender=sender_pb2.Sender(sender_id=sender.sender_id, display_name="One", etag=sender.etag),
        update_mask=FieldMask(paths=["display_name"]),
    )
    changed = await scheduler.senders.UpdateSender(update)
    assert changed.etag != sender.etag
    old: dict[str, Any] = {"sender_id": sender.sender_id, "etag": sender.etag}
    for call in (
        scheduler.senders.UpdateSender(update),
        scheduler.senders.PauseSender(PauseSenderRequest(**old)),
        scheduler.senders.ResumeSender(ResumeSenderRequest(**old)),
        scheduler.senders.DeleteSender(DeleteSenderRequest(**old)),
    ):
        refused = await refusal_of(call)
        assert (refused.code, refused.reason) == ("ABORTED", "ETAG_MISMATCH")
    get = GetSenderRequest(sender_id=sender.sender_id)
    assert stored(await scheduler.senders.GetSender(get)) == changed
    await scheduler.senders.DeleteSender(
        DeleteSenderRequest(sender_id=sender.sender_id, etag=changed.etag)
    )


async def test_a_suppression_and_a_batch_have_etags(scheduler: Scheduler) -> None:
    def deletion(etag: str) -> Any:
        return scheduler.suppressions.DeleteSuppression(
            suppression_service_pb2.DeleteSuppressionRequest(
                user_id="ann", email="a@b.org", etag=etag
            )
        )

    request = suppression_service_pb2.CreateSuppressionRequest(
        user_id="ann", suppression=Suppression(email="a@b.org")
    )
    first = await scheduler.suppressions.CreateSuppression(request)
    await deletion(first.etag)
    assert (await refusal_of(deletion(first.etag))).code == "NOT_FOUND"
    second = await scheduler.suppressions.CreateSuppression(request)
    assert (await refusal_of(deletion(first.etag))).reason == "ETAG_MISMATCH"
    await deletion(second.etag)

    batch = (await scheduler.schedule(await scheduler.sender())).batch
    cancel = batch_service_pb2.CancelBatchRequest(batch_id=batch.batch_id, etag="other")
    assert (await refusal_of(scheduler.batches.CancelBatch(cancel))).reason == "ETAG_MISMATCH"
    cancel.etag = batch.etag
    cancelled = (await scheduler.batches.CancelBatch(cancel)).batch
    assert cancelled.etag != batch.etag


# Errors --------------------------------------------------------------------------------------


async def test_all_wrong_fields_are_reported_at_once(scheduler: Scheduler) -> None:
    wrong = creation("", email="nobody", hourly_limit=0, max_in_flight=2000)
    refused = await refusal_of(scheduler.senders.CreateSender(wrong))
    assert set(refused.violations) == {
        "sender.email",
        "sender.hourly_limit",
        "sender.max_in_flight",
    }
    assert refused.reason == "ADDRESS_INVALID"
    for field in refused.violations:
        assert field in refused.message


async def test_an_update_of_the_state_names_the_method_that_changes_it(
    scheduler: Scheduler,
) -> None:
    sender = await scheduler.sender()
    asked = sender_pb2.Sender(
        sender_id=sender.sender_id, state=sender_pb2.SENDER_STATE_PAUSED, email=sender.email
    )
    for mask in (None, FieldMask(paths=["state"]), FieldMask(paths=["*"])):
        refused = await refusal_of(
            scheduler.senders.UpdateSender(UpdateSenderRequest(sender=asked, update_mask=mask))
        )
        assert (refused.code, refused.reason) == ("INVALID_ARGUMENT", "UPDATE_MASK_INVALID")
        assert "PauseSender" in refused.message
    asked.state = sender_pb2.SENDER_STATE_ACTIVE
    asked.user_id = "bob"
    refused = await refusal_of(scheduler.senders.UpdateSender(UpdateSenderRequest(sender=asked)))
    assert "sender.user_id" in refused.violations
    # A changed copy of what was read is fine: its state is the present one.
    copy = sender_pb2.Sender()
    copy.CopyFrom(sender)
    copy.display_name = "Copy"
    updated = await scheduler.senders.UpdateSender(UpdateSenderRequest(sender=copy))
    assert updated.display_name == "Copy"


# The audit log -------------------------------------------------------------------------------


async def test_the_audit_log_says_who_changed_what(scheduler: Scheduler) -> None:
    sender = await scheduler.senders.CreateSender(creation("", display_name="News"))
    update = UpdateSenderRequest(
        sender=sender_pb2.Sender(sender_id=sender.sender_id, hourly_limit=7),
        identity="carol@example.com",
        reason="ticket 12",
    )
    await scheduler.senders.UpdateSender(update)
    await scheduler.senders.PauseSender(PauseSenderRequest(sender_id=sender.sender_id))
    # It is paused already: nothing changes.
    await scheduler.senders.PauseSender(PauseSenderRequest(sender_id=sender.sender_id))
    await scheduler.senders.DeleteSender(DeleteSenderRequest(sender_id=sender.sender_id))

    target = f"senders/{sender.sender_id}"
    deleted, paused, updated, created = await events(scheduler, target=target)
    assert [one.action for one in (created, updated, paused, deleted)] == [
        *("CreateSender", "UpdateSender"),
        *("PauseSender", "DeleteSender"),
    ]
    assert {one.user_id for one in (created, deleted)} == {"ann"}
    assert (updated.actor, updated.identity, updated.reason) == (
        "local",
        "carol@example.com",
        "ticket 12",
    )
    assert values(created)[0] is None
    assert values(created)[1]["email"] == "news@example.com"
    assert values(updated) == ({"hourly_limit": 200}, {"hourly_limit": 7})
    assert values(paused) == (
        {"state": "SENDER_STATE_ACTIVE"},
        {"state": "SENDER_STATE_PAUSED"},
    )
    assert values(deleted)[1] is None


async def test_the_audit_log_is_paged_and_filtered(scheduler: Scheduler) -> None:
    for number in range(5):
        await scheduler.sender(user_id=f"user-{number % 2}")
    page = await events(scheduler)
    assert [event.user_id for event in page] == ["user-0", "user-1"] * 2 + ["user-0"]
    async with grpc.aio.insecure_channel(scheduler.address) as channel:
        stub = audit_service_pb2_grpc.AuditServiceStub(channel)
        found: list[AuditEvent] = []
        token = ""
        while True:
            answer = await stub.ListAuditEvents(
                ListAuditEventsRequest(page_size=2, page_token=token)
            )
            found += answer.audit_events
            token = answer.next_page_token
            if not token:
                break
    assert found == page
    assert len(await events(scheduler, user_id="user-1")) == 2
    middle = page[2].event_time
    assert await events(scheduler, start_time=middle) == page[:3]
    assert await events(scheduler, end_time=middle) == page[3:]


async def test_an_erased_recipient_is_not_in_the_audit_log(scheduler: Scheduler) -> None:
    sender = await scheduler.sender()
    own = await scheduler.schedule(sender, "email\nAnna@b.org\n")
    job = scheduler.value("SELECT id FROM email_jobs")
    # A batch of hers alone is about her, whatever its texts say. Others may name her.
    others = await scheduler.schedule(sender, "email\nc@d.org\ne@f.org\n")
    link = batch_pb2.MailHeader(name="X-Page", value="<https://b.org/?for=anna%40b.org>")
    for batch in (
        batch_pb2.Batch(batch_id=own.batch.batch_id, subject="For Anna"),
        batch_pb2.Batch(batch_id=others.batch.batch_id, headers=[link]),
        batch_pb2.Batch(batch_id=others.batch.batch_id, body="x " * 498 + "anna@b.org"),
    ):
        await scheduler.batches.UpdateBatch(
            batch_service_pb2.UpdateBatchRequest(batch=batch, identity="her friend")
        )
    updates = await events(scheduler, target=f"batches/{own.batch.batch_id}")
    assert values(updates[0])[1] == {"subject": "For Anna"}
    await scheduler.jobs.CancelEmailJob(
        email_job_service_pb2.CancelEmailJobRequest(
            email_job_id=str(job), request_id=new_id(), reason="anna@b.org called"
        )
    )
    for _ in range(2):
        await scheduler.suppressions.CreateSuppression(
            suppression_service_pb2.CreateSuppressionRequest(
                user_id="ann",
                suppression=Suppression(email="anna@b.org", reason="left"),
                request_id=new_id(),
            )
        )
    stored = "SELECT request_id, encode(answer, 'escape') FROM change_requests"
    assert "nna@b.org" in str(scheduler.rows(stored))
    await scheduler.jobs.RetryEmailJobs(
        email_job_service_pb2.RetryEmailJobsRequest(
            user_id="ann", filter='recipient = "anna@b.org"', validate_only=True
        )
    )
    await scheduler.jobs.CancelEmailJobs(
        email_job_service_pb2.CancelEmailJobsRequest(
            user_id="ann", filter='recipient = "anna@b.org"', request_id="for anna@b.org"
        )
    )
    await scheduler.suppressions.EraseRecipient(
        suppression_service_pb2.EraseRecipientRequest(
            user_id="ann", email="anna@b.org", reason="Anna@b.org asked for it"
        )
    )
    assert "nna@b.org" not in str(scheduler.rows(stored))
    kept = str(scheduler.rows("SELECT * FROM audit_events"))
    assert not [text for text in ("nna@b", "nna%40b", "For Anna") if text in kept]
    # The whole body names her, its audited beginning does not, so it stays with who changed it.
    assert kept.count("her friend") == kept.count("(1,006 characters)") == 1
    assert len(await events(scheduler)) == 10


async def test_operators_see_the_audit_log_and_users_do_not(
    database_url: str, redis_url: str
) -> None:
    async with rivals(database_url, redis_url) as world:
        await world.sender(world.ann)
        request = user_service_pb2.UpdateUserRequest(
            user=User(user_id="ann", quotas=UserQuotas(senders=3)), reason="a larger plan"
        )
        await world.users.UpdateUser(request, metadata=world.operator)
        async with grpc.aio.insecure_channel(world.scheduler.address) as channel:
            stub = audit_service_pb2_grpc.AuditServiceStub(channel)
            for key in (world.ann, world.service):
                refused = await refusal_of(
                    stub.ListAuditEvents(ListAuditEventsRequest(user_id="ann"), metadata=key)
                )
                assert (refused.code, refused.reason) == (
                    "PERMISSION_DENIED",
                    "OPERATOR_REQUIRED",
                )
            answer = await stub.ListAuditEvents(
                ListAuditEventsRequest(user_id="ann"), metadata=world.operator
            )
    by_operator, by_ann = answer.audit_events
    assert by_operator.actor.startswith("key:")
    assert by_ann.actor.startswith("key:")
    assert by_operator.actor != by_ann.actor
    assert by_operator.target == "users/ann"
    assert values(by_operator) == ({}, {"senders": 3})
    assert by_operator.reason == "a larger plan"
