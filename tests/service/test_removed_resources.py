"""The answers to callers about jobs and batches that retention has removed."""

from __future__ import annotations

from datetime import timedelta

from outbox.v1 import batch_service_pb2, email_job_service_pb2

from outbox_server.shared.database.engine import create_engine
from outbox_server.shared.retention.purging import Purger
from tests.scheduler_stack import Scheduler, refusal_of, running_scheduler


async def purge(scheduler: Scheduler) -> None:
    engine = create_engine(scheduler.settings, lookups_only=True)
    await Purger(engine, timedelta(days=1)).purge_once()
    await engine.dispose()


async def test_after_a_removal_paging_continues_and_removed_ids_are_not_found(
    database_url: str, redis_url: str
) -> None:
    async with running_scheduler(database_url, redis_url) as scheduler:
        sender = await scheduler.sender("ann")
        old = await scheduler.schedule(sender, "email\na@b.org\nc@d.org\n", request_id="once")
        new = await scheduler.schedule(sender, "email\ne@f.org\ng@h.org\n")
        listing = email_job_service_pb2.ListEmailJobsRequest(user_id="ann", page_size=1)
        first = await scheduler.jobs.ListEmailJobs(listing)
        assert first.email_jobs[0].batch_id == old.batch.batch_id
        scheduler.execute(
            "UPDATE email_jobs SET state = 6, finished_at = now() - interval '2 days'"
            " WHERE batch_id = %s",
            int(old.batch.batch_id),
        )
        scheduler.execute(
            "UPDATE batches SET created_at = now() - interval '2 days' WHERE id = %s",
            int(old.batch.batch_id),
        )
        scheduler.execute("DELETE FROM count_deltas")

        await purge(scheduler)

        listing.page_token = first.next_page_token
        following = await scheduler.jobs.ListEmailJobs(listing)
        assert following.email_jobs[0].batch_id == new.batch.batch_id
        removed = old.batch.batch_id
        for call in (
            scheduler.batches.GetBatch(batch_service_pb2.GetBatchRequest(batch_id=removed)),
            scheduler.batches.CancelBatch(batch_service_pb2.CancelBatchRequest(batch_id=removed)),
        ):
            refusal = await refusal_of(call)
            assert (refusal.code, refusal.reason) == ("NOT_FOUND", "BATCH_NOT_FOUND")
            assert "removed after OUTBOX_RETENTION" in refusal.message
        # A removed batch frees its request id. A batch that remains keeps its own.
        again = await scheduler.schedule(sender, "email\na@b.org\nc@d.org\n", request_id="once")
        assert not again.replayed
        assert int(again.batch.batch_id) > int(new.batch.batch_id)
