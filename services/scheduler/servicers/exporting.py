"""Streams the jobs of ExportEmailJobs, page by page."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Final

from outbox.v1 import email_job_service_pb2
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.services.scheduler.servicers.calls import listed_user
from outbox_server.services.scheduler.servicers.filtered_jobs import is_narrowed, job_tree
from outbox_server.services.scheduler.servicers.job_mapping import to_attempt, to_job
from outbox_server.services.scheduler.storage.email_jobs import JobRecord, list_jobs
from outbox_server.services.scheduler.storage.job_filters import JobFilter, JobPosition
from outbox_server.shared.callers import current_claimant, in_parts
from outbox_server.shared.database.engine import snapshot
from outbox_server.shared.database.ownership import bind_call
from outbox_server.shared.fair_shares import FairShares
from outbox_server.shared.rpc import page_tokens
from outbox_server.shared.rpc.proto_mapping import id_text

_EXPORT: Final = "exported jobs"
_AT_ONCE: Final = 500


class JobExporter:
    """Reads the jobs of exports. `reads` has a place for each page that is being read."""

    def __init__(self, engine: AsyncEngine, reads: FairShares) -> None:
        self._engine = engine
        self._reads = reads

    async def export(
        self,
        request: email_job_service_pb2.ExportEmailJobsRequest,
        installation_id: Callable[[], Awaitable[str]],
    ) -> AsyncIterator[email_job_service_pb2.ExportEmailJobsResponse]:
        """Yield the jobs that match. No transaction is open while the caller receives them.

        Raises:
            InvalidInput: RESUME_TOKEN_INVALID, FILTER_INVALID, USER_ID_REQUIRED.
        """
        tree = job_tree(request)
        which = JobFilter(listed_user(request.user_id, narrowed=is_narrowed(tree)), tree)
        bind_call(which.user_id)
        stream = page_tokens.digest_filters(
            which.user_id, request.sender_id, request.batch_id, request.filter
        )
        place = page_tokens.decode_resume(request.resume_token, _EXPORT, stream, (int, int))
        after: JobPosition | None = which.start if place is None else (int(place[0]), int(place[1]))
        while after is not None:
            async with (
                self._reads.entered(current_claimant()),
                snapshot(self._engine) as connection,
            ):
                found, reached = await list_jobs(connection, which, after, _AT_ONCE)
            after = found[-1][0] if len(found) == _AT_ONCE else reached
            installation = await installation_id()
            yield email_job_service_pb2.ExportEmailJobsResponse(
                exported_email_jobs=await in_parts(found, partial(_exported, installation)),
                resume_token="" if after is None else page_tokens.encode(_EXPORT, stream, after),
            )


def _exported(
    installation_id: str, found: tuple[JobPosition, JobRecord]
) -> email_job_service_pb2.ExportedEmailJob:
    _, job = found
    last = None if job.last is None else to_attempt(id_text(job.job_id), job.last)
    return email_job_service_pb2.ExportedEmailJob(
        email_job=to_job(job, installation_id), last_attempt=last
    )
