"""Following a batch until nothing of it waits."""

from __future__ import annotations

import time
from typing import Final

import grpc
from outbox.v1.batch_pb2 import Batch, BatchState
from outbox.v1.batch_service_pb2 import GetBatchRequest
from outbox.v1.batch_service_pb2_grpc import BatchServiceStub
from outbox.v1.email_job_pb2 import JobCounts

from cli.client import TIMEOUT_S
from cli.output import note
from cli.progress import JobProgress

POLL_S: Final = 0.5
# A scheduler that is started again is back long before.
_PATIENCE_S: Final = 60.0


def ended_count(counts: JobCounts) -> int:
    """Return how many jobs are in a final state."""
    waits = ("scheduled_count", "sending_count")
    names = [field.name for field in counts.DESCRIPTOR.fields if field.name not in waits]
    return sum(getattr(counts, name) for name in names)


def is_open(batch: Batch) -> bool:
    """Return whether a job of the batch waits or is being sent."""
    counts = batch.counts
    return bool(
        batch.state == BatchState.BATCH_STATE_ACTIVE
        or counts.scheduled_count
        or counts.sending_count
    )


def remark_on(counts: JobCounts) -> str:
    """Return what is not sent and not waiting either, for people."""
    states = ("failed", "uncertain", "cancelled", "suppressed", "expired")
    return ", ".join(
        f"{count} {state}" for state in states if (count := getattr(counts, f"{state}_count"))
    )


def follow_to_end(batches: BatchServiceStub, batch: Batch, user: str) -> Batch:
    """Show the batch's progress until every job has ended, and return it as it is then.

    Raises:
        grpc.RpcError: the scheduler refuses, or was away for a minute.
    """
    request = GetBatchRequest(batch_id=batch.batch_id, user_id=user)
    away_since: float | None = None
    title = f"batch {batch.batch_id}"
    with JobProgress({title: batch.accepted_count}) as progress:
        while is_open(batch):
            progress.update(title, ended_count(batch.counts), remark_on(batch.counts))
            time.sleep(POLL_S)
            try:
                batch = batches.GetBatch(request, timeout=TIMEOUT_S)
                away_since = None
            except grpc.RpcError as error:
                now = time.monotonic()
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                if away_since is None:
                    away_since = now
                    note("the scheduler does not answer; asking again")
                elif now - away_since > _PATIENCE_S:
                    raise
        progress.update(title, ended_count(batch.counts), remark_on(batch.counts))
    return batch
