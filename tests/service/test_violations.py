"""A refused call names everything that is wrong with its fields, not only the first."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp
from outbox.v1 import batch_pb2, batch_service_pb2, email_job_service_pb2, sender_pb2
from outbox.v1.sender_service_pb2 import UpdateSenderRequest
from outbox.v1.suppression_pb2 import Suppression
from outbox.v1.suppression_service_pb2 import CreateSuppressionRequest

from tests.scheduler_stack import Scheduler, refusal_of


async def test_all_wrong_options_then_all_wrong_templates_are_reported(
    scheduler: Scheduler,
) -> None:
    options = batch_pb2.BatchOptions(
        sender_id=(await scheduler.sender()).sender_id,
        duplicates=77,  # type: ignore[arg-type]  # no such value
        mode=88,  # type: ignore[arg-type]
        spacing=Duration(seconds=-1),
        schedule_time=Timestamp(seconds=10**15),
        external_id="\0",
        labels={"A": "x"},
        name_column="-",
    )
    recipients = batch_pb2.Recipients(rows=[batch_pb2.Recipient(email="ann@example.com")])
    batch = batch_service_pb2.ScheduleBatchRequest(options=options, recipients=recipients)
    refused = await refusal_of(scheduler.batches.ScheduleBatch(batch))
    names = ("duplicates", "mode", "schedule_time", "request_id", "spacing")
    assert set(refused.violations) == {
        f"options.{name}" for name in (*names, "name_column", "external_id", "labels")
    }

    # Templates are parsed when the values of the fields are right.
    options = batch_pb2.BatchOptions(sender_id=options.sender_id)
    options.request_id, options.subject, options.body = "1", "{{ a", "{% if %}"
    options.headers.add(name="X-A", value="{{ b | nofilter }}")
    batch.options.CopyFrom(options)
    refused = await refusal_of(scheduler.batches.ScheduleBatch(batch))
    templates = {"options.subject", "options.body", "options.headers[0].value"}
    assert (refused.reason, set(refused.violations)) == ("TEMPLATE_INVALID", templates)


async def test_all_wrong_fields_of_a_list_and_of_a_suppression_are_reported(
    scheduler: Scheduler,
) -> None:
    jobs = email_job_service_pb2.ListEmailJobsRequest(
        state=99,  # type: ignore[arg-type]
        filter="foo = 1",
        order_by="foo",
        page_size=-1,
    )
    refused = await refusal_of(scheduler.jobs.ListEmailJobs(jobs))
    assert set(refused.violations) == {"state", "filter", "order_by", "page_size"}

    moved = email_job_service_pb2.RescheduleEmailJobsRequest(
        user_id="ann", filter="foo = 1", delay=Duration(seconds=10**13), identity="\0"
    )
    refused = await refusal_of(scheduler.jobs.RescheduleEmailJobs(moved))
    assert (refused.reason, set(refused.violations)) == (
        "FILTER_INVALID",
        {"filter", "delay", "identity"},
    )

    suppression = Suppression(email="nobody", reason="\0")
    suppress = CreateSuppressionRequest(
        user_id="ann", suppression=suppression, identity="\0", request_id="\0"
    )
    refused = await refusal_of(scheduler.suppressions.CreateSuppression(suppress))
    assert set(refused.violations) == {
        *("suppression.email", "suppression.reason", "identity", "request_id")
    }


async def test_what_no_job_can_match_finds_nothing_also_in_the_first_call(
    scheduler: Scheduler,
) -> None:
    request = email_job_service_pb2.ListEmailJobsRequest(user_id="ann", recipient="\0")
    assert not (await scheduler.jobs.ListEmailJobs(request)).email_jobs


async def test_all_wrong_paths_of_a_mask_are_reported(scheduler: Scheduler) -> None:
    sender = await scheduler.sender()
    update = UpdateSenderRequest(
        sender=sender_pb2.Sender(sender_id=sender.sender_id),
        update_mask=FieldMask(paths=["foo", "state", "hourly_limit"]),
        identity="\0",
    )
    refused = await refusal_of(scheduler.senders.UpdateSender(update))
    assert "'foo' cannot be changed here; use email" in refused.message
    assert "'state' cannot be changed here; use PauseSender" in refused.message
    assert set(refused.violations) == {"update_mask", "identity"}
