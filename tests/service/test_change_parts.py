"""Changes that are made in parts: each part has its event in the audit log, whatever comes next."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from outbox.v1 import audit_service_pb2_grpc
from outbox.v1.audit_service_pb2 import ListAuditEventsRequest
from outbox.v1.email_job_service_pb2 import (
    CancelEmailJobRequest,
    CancelEmailJobsRequest,
    RescheduleEmailJobsRequest,
    RetryEmailJobsRequest,
)

from outbox_server.services.scheduler import job_sets
from outbox_server.services.scheduler.storage import job_set_rows
from outbox_server.shared.heads.coalescing import ShardLoads
from outbox_server.shared.states import JobState
from tests.scheduler_stack import Scheduler, refusal_of

ROWS = "email\n" + "".join(f"user{number}@b.org\n" for number in range(4))


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every part of a call small."""
    monkeypatch.setattr(job_set_rows, "ROWS_AT_ONCE", 2)
    # So that a part may end within a block.
    monkeypatch.setattr(job_set_rows, "BLOCK_JOBS", 1)


async def events(scheduler: Scheduler, action: str) -> list[tuple[str, str, Any]]:
    """Return owner, target and new values of the events of one kind, the oldest first."""
    async with grpc.aio.insecure_channel(scheduler.address) as channel:
        stub = audit_service_pb2_grpc.AuditServiceStub(channel)
        answer = await stub.ListAuditEvents(ListAuditEventsRequest(page_size=100))
    return [
        (event.user_id, event.target, json_format.MessageToDict(event.after))
        for event in reversed(answer.audit_events)
        if event.action == action
    ]


@pytest.mark.usefixtures("small_parts")
async def test_a_change_in_parts_is_recorded_for_the_owner_whom_the_caller_need_not_name(
    scheduler: Scheduler,
) -> None:
    sender = await scheduler.sender("ann")
    batch = (await scheduler.schedule(sender, ROWS)).batch.batch_id
    target = f"batches/{batch}"
    later = RescheduleEmailJobsRequest(batch_id=batch, delay=Duration(seconds=60))
    assert (await scheduler.jobs.RescheduleEmailJobs(later)).rescheduled_count == 4
    assert (
        await events(scheduler, "RescheduleEmailJobs")
        == [("ann", target, {"count": 2.0, "delay": "1m"})] * 2
    )

    wanted = "recipient = user1@b.org"
    cancel = CancelEmailJobsRequest(batch_id=batch, filter=wanted, request_id="once")
    for validate_only in (True, False):
        cancel.validate_only = validate_only
        assert (await scheduler.jobs.CancelEmailJobs(cancel)).cancelled_count == 1
        cancel.request_id = "twice"
    expected = ("ann", target, {"count": 1.0, "filter": wanted, "state": "CANCELLED"})
    assert await events(scheduler, "CancelEmailJobs") == [expected]
    # So an erasure of the recipient finds both.
    owners = "SELECT request_id, user_id FROM change_requests WHERE answer IS NOT NULL ORDER BY 1"
    assert scheduler.rows(owners) == [("once", None), ("twice", "ann")]

    scheduler.end_jobs(JobState.FAILED)
    retry = RetryEmailJobsRequest(sender_id=sender.sender_id)
    assert (await scheduler.jobs.RetryEmailJobs(retry)).retried_count == 3
    target = f"senders/{sender.sender_id}"
    assert await events(scheduler, "RetryEmailJobs") == [
        ("ann", target, {"count": count, "state": "SCHEDULED"}) for count in (2.0, 1.0)
    ]
    # Nothing is left to do, and nothing is recorded.
    assert (await scheduler.jobs.RetryEmailJobs(retry)).retried_count == 0
    assert len(await events(scheduler, "RetryEmailJobs")) == 2


@pytest.mark.parametrize("kind", ["job", "set", "batch", "retry", "retried set"])
async def test_a_change_that_is_interrupted_after_a_commit_is_in_the_audit_log(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    sender = await scheduler.sender("ann")
    batch = (await scheduler.schedule(sender, ROWS)).batch.batch_id
    job = str(scheduler.value("SELECT min(id) FROM email_jobs"))
    if kind.startswith("retr"):
        scheduler.end_jobs(JobState.FAILED)

    async def interrupted(*_: object, **__: object) -> None:
        raise RuntimeError("as if the process were killed here")

    def not_begun(*_: object) -> None:
        raise RuntimeError("as if the process were killed here")

    monkeypatch.setattr(ShardLoads, "_begin", not_begun)
    monkeypatch.setattr(job_sets, "load_soon", interrupted)
    jobs = scheduler.jobs
    requests: dict[str, tuple[Any, Message]] = {
        "job": (jobs.CancelEmailJob, CancelEmailJobRequest(email_job_id=job)),
        "set": (
            jobs.CancelEmailJobs,
            CancelEmailJobsRequest(batch_id=batch, filter="row_number = 1"),
        ),
        "batch": (jobs.CancelEmailJobs, CancelEmailJobsRequest(batch_id=batch)),
        "retry": (jobs.RetryEmailJobs, RetryEmailJobsRequest(batch_id=batch)),
        "retried set": (
            jobs.RetryEmailJobs,
            RetryEmailJobsRequest(batch_id=batch, filter="row_number = 1"),
        ),
    }
    call, request = requests[kind]
    assert (await refusal_of(call(request))).code == "INTERNAL"
    (event,) = await events(scheduler, request.DESCRIPTOR.name.removesuffix("Request"))
    assert event[:2] == ("ann", f"email-jobs/{job}" if kind == "job" else f"batches/{batch}")
