"""Each method that changes something tells the audit log who did what, and the values before."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.timestamp_pb2 import Timestamp
from outbox.v1.audit_pb2 import AuditEvent
from outbox.v1.audit_service_pb2 import ListAuditEventsRequest
from outbox.v1.batch_service_pb2 import ScheduleBatchRequest
from outbox.v1.hold_service_pb2 import BeginHoldRequest, ReleaseHeldJobsRequest
from outbox.v1.sender_pb2 import Sender

from outbox_server.services.scheduler.storage.changes import ACCEPTING
from outbox_server.shared.secrets import generate_key
from outbox_server.shared.states import JobState
from tests.contract_methods import contract_methods
from tests.scheduler_stack import Scheduler, options_for, refusal_of, running_scheduler

SAID: Final = {"identity": "carol@example.com", "reason": "ticket 12"}
# They are about no user's data.
OF_NO_USER: Final = {"RevokeApiKey", "CreateApiKey", "BeginHold", "CancelHeldJobs"}
# They are about an unnamed set.
WITHOUT_TARGET: Final = {"BeginHold", "CancelHeldJobs", "ReleaseHeldJobs"}
# What they change has no value before, or its value is a secret.
WITHOUT_BEFORE: Final = {
    *("ImportSuppressions", "ImportSuppressionsFile", "EraseRecipient"),
    *("RotateWebhookSecret", "TestWebhook", "RedeliverWebhook"),
    *("CancelHeldJobs", "ReleaseHeldJobs"),
    *ACCEPTING,
}


@pytest.fixture
async def scheduler(database_url: str, redis_url: str) -> AsyncIterator[Scheduler]:
    async with running_scheduler(
        database_url, redis_url, encryption_keys=generate_key()
    ) as running:
        yield running


async def test_every_change_is_in_the_audit_log_with_the_values_before_and_after(
    scheduler: Scheduler,
) -> None:
    began = datetime.now(UTC)
    call = Changer(scheduler)
    sender = await call("CreateSender", user_id="ann", sender={"email": "news@example.com"})
    await change_mail(call, sender)
    await change_the_rest(call)
    await call("DeleteSender", sender_id=sender.sender_id, force=True)
    # The last one of each kind: a value that was never set before has none before.
    found = {event.action: event for event in reversed(await all_events(scheduler))}
    # test_dispatcher.py has the event of a dispatcher.
    expected = {
        method.name
        for method in contract_methods()
        if {"identity", "reason"} <= set(method.input_type.fields_by_name)
    } - {"DrainDispatcher"}
    assert found.keys() == expected
    for event in found.values():
        about = str(event)
        assert (event.actor, event.identity, event.reason) == ("local", *SAID.values()), about
        assert event.event_time.ToDatetime(UTC) >= began - timedelta(seconds=1), about
        assert event.user_id == ("" if event.action in OF_NO_USER else "ann"), about
        assert bool(event.target) == (event.action not in WITHOUT_TARGET), about
        before, after = MessageToDict(event.before), MessageToDict(event.after)
        assert bool(before) == (
            not event.action.startswith("Create") and event.action not in WITHOUT_BEFORE
        ), about
        assert bool(after) == (not event.action.startswith("Delete")), about
        assert before != after, about


class Changer:
    """Makes calls whose requests are written as dictionaries, with identity and reason."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self._methods = {method.name: method for method in contract_methods()}

    async def __call__(self, name: str, then: Any = None, **fields: Any) -> Any:
        """Call a method. `then` has the fields of the second message of a stream."""
        method = self._methods[name]
        message = GetMessageClass(method.input_type)
        request = message(**fields, **SAID)
        stubs = vars(self.scheduler).values()
        call = next(getattr(stub, name) for stub in stubs if hasattr(stub, name))
        if not method.client_streaming:
            return await call(request)
        return await call(iter([request] if then is None else [request, message(**then)]))

    def fail(self, batch_id: str) -> None:
        """Let the jobs of a batch have failed."""
        self._end(batch_id, JobState.FAILED)

    def doubt(self, batch_id: str) -> None:
        """Let the jobs of a batch be uncertain."""
        self._end(batch_id, JobState.UNCERTAIN)

    def _end(self, batch_id: str, state: JobState) -> None:
        self.scheduler.end_jobs(state, "batch_id = %s", int(batch_id))


async def change_mail(call: Changer, sender: Sender) -> None:
    scheduler = call.scheduler
    which = {"sender_id": sender.sender_id}
    await call("UpdateSender", sender={**which, "hourly_limit": 7})
    await call("PauseSender", **which)
    await call("ResumeSender", **which)

    async def batch() -> dict[str, str]:
        accepted = await call("ScheduleBatch", options=options_for(sender), csv=b"email\na@b.org")
        return {"batch_id": accepted.batch.batch_id}

    first, second, third, fourth = [await batch() for _ in range(4)]
    await call("PauseBatch", **first)
    await call("ResumeBatch", **first)
    await call("UpdateBatch", batch={**first, "subject": "News"})
    await call("RescheduleEmailJobs", **first, delay=Duration(seconds=60))
    await call("RescheduleEmailJobs", **first, schedule_time=Timestamp(seconds=2_000_000_000))
    await call("CancelBatch", **first)
    job = scheduler.value("SELECT id FROM email_jobs WHERE batch_id = %s", int(second["batch_id"]))
    await call("CancelEmailJob", email_job_id=str(job))
    call.fail(third["batch_id"])
    await call("RetryEmailJobs", **third)
    call.fail(third["batch_id"])
    await call("RetryEmailJobs", **third, filter="state = FAILED")
    await call("CancelEmailJobs", **third)
    call.doubt(fourth["batch_id"])
    job = scheduler.value("SELECT id FROM email_jobs WHERE batch_id = %s", int(fourth["batch_id"]))
    await call("ResolveEmailJob", email_job_id=str(job), resolution=1)

    chunk = {"chunk": b"email\na@b.org\n"}
    await call("UploadBatch", options=options_for(sender), then=chunk)
    file = {"data": b"email\na@b.org\n", "content_type": "text/csv"}
    await call("UploadBatchFile", options=options_for(sender), file=file)
    await call("SendTestEmail", options=options_for(sender), recipient={"email": "me@b.org"})
    await call("BeginHold")
    await call("CancelHeldJobs", all=True)
    await batch()
    await call("BeginHold")
    await call("ReleaseHeldJobs", filter={"user_id": "ann"})


async def change_the_rest(call: Changer) -> None:
    ann: dict[str, Any] = {"user_id": "ann"}
    await call("CreateSuppression", **ann, suppression={"email": "x@y.org", "reason": "left"})
    await call("DeleteSuppression", **ann, email="x@y.org")
    await call("ImportSuppressions", **ann, chunk=b"email\nc@d.org\n")
    file = {"data": b"email\ne@f.org\n", "content_type": "text/csv"}
    await call("ImportSuppressionsFile", **ann, file=file)
    await call("EraseRecipient", **ann, email="nobody@example.com")
    await call("UpdateUser", user={**ann, "quotas": {"senders": 3}})
    await call("UpdateUser", user={**ann, "quotas": {"senders": 4}})

    # No address of it may be reached.
    hook = await call("CreateWebhook", **ann, webhook={"url": "https://10.0.0.1/hook"})
    one = {"webhook_id": hook.webhook_id}
    await call("UpdateWebhook", webhook={**one, "disabled": True})
    await call("RotateWebhookSecret", **one)
    await call("TestWebhook", **one)
    call.scheduler.execute(
        "INSERT INTO webhook_deliveries (id, webhook_id, after_event, last_event, event_count,"
        " error) VALUES (1, %s, 0, 1, 1, '')",
        int(hook.webhook_id),
    )
    await call("RedeliverWebhook", **one)
    await call("DeleteWebhook", **one)
    key = (await call("CreateApiKey", api_key={"kind": 2})).api_key
    await call("RevokeApiKey", api_key_id=key.api_key_id)


async def test_each_accepted_batch_has_one_event_without_its_recipients(
    scheduler: Scheduler,
) -> None:
    sender = await scheduler.sender("ann")
    began = datetime.now(UTC)

    async def accept(number: int, csv: bytes, **fields: Any) -> str:
        options = options_for(sender, **fields)
        request = ScheduleBatchRequest(
            options=options, csv=csv, identity=f"caller {number}", reason="ticket 12"
        )
        for check in (True, False, False):  # a check, the call, and a repeated call
            request.validate_only = check
            answer = await scheduler.batches.ScheduleBatch(request)
        assert answer.replayed
        return answer.batch.batch_id

    # At once, so that some are stored in one group. Larger batches are stored one by one.
    csvs = [b"email,name\nann@b.org,Ann\n"] * 20 + [many("u", 2), many("v", 200)] * 5
    ids = await asyncio.gather(*(accept(*each) for each in enumerate(csvs)))
    options = {"spacing": Duration(seconds=2), "expire_after": Duration(seconds=60)}
    spread = await accept(99, b"email\na@b.org\na@b.org\nx\n", **options)
    found = {event.target: event for event in await all_events(scheduler)}
    assert len(found) == len(await all_events(scheduler)) == len(ids) + 2

    for number, (batch_id, csv) in enumerate(zip(ids, csvs, strict=True)):
        event = found[f"batches/{batch_id}"]
        assert (event.action, event.actor, event.user_id) == ("ScheduleBatch", "local", "ann")
        assert (event.identity, event.reason) == (f"caller {number}", "ticket 12")
        assert not event.HasField("before")
        after = MessageToDict(event.after)
        assert datetime.fromisoformat(after.pop("schedule_time")) >= began - timedelta(seconds=1)
        rows = csv.count(b"@")
        assert after == {
            "sender_id": sender.sender_id,
            "spacing": "0ms",
            "accepted_count": rows,
            **dict.fromkeys(("rejected_count", "duplicate_count", "suppressed_count"), 0),
            # That of a single mail may be about the recipient.
            **({"subject": "Hello"} if rows > 1 else {}),
        }
    after = MessageToDict(found[f"batches/{spread}"].after)
    assert (after["spacing"], after["expire_after"]) == ("2s", "1m")
    assert (after["accepted_count"], after["rejected_count"], after["duplicate_count"]) == (1, 1, 1)


def many(name: str, count: int) -> bytes:
    return b"email\n" + b"".join(b"%s%d@b.org\n" % (name.encode(), n) for n in range(count))


async def test_no_batch_is_accepted_without_its_event(scheduler: Scheduler) -> None:
    sender = await scheduler.sender("ann")
    await scheduler.define("ALTER TABLE audit_events ADD CONSTRAINT full_ CHECK (false) NOT VALID")
    try:
        for rows in (1, 200):
            refused = await refusal_of(scheduler.schedule(sender, many("u", rows)))
            assert refused.code == "INTERNAL"
    finally:
        await scheduler.define("ALTER TABLE audit_events DROP CONSTRAINT full_")
    assert scheduler.value("SELECT count(*) FROM batches") == 0
    assert scheduler.value("SELECT count(*) FROM email_jobs") == 0


async def all_events(scheduler: Scheduler) -> list[AuditEvent]:
    answer = await scheduler.audit.ListAuditEvents(ListAuditEventsRequest(page_size=1_000))
    return list(answer.audit_events)


async def test_a_hold_is_in_the_audit_log(scheduler: Scheduler) -> None:
    request = BeginHoldRequest(request_id="begin", reason="an incident")
    assert (await scheduler.holds.BeginHold(request)).held
    await scheduler.holds.ReleaseHeldJobs(ReleaseHeldJobsRequest(all=True, request_id="release"))
    # The first call was made already, so the installation is not held again.
    assert not (await scheduler.holds.BeginHold(request)).held
    released, begun = await all_events(scheduler)
    assert [begun.action, released.action] == ["BeginHold", "ReleaseHeldJobs"]
    assert begun.reason == "an incident"
