"""Implements EmailJobService."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Final

from outbox.v1 import email_job_pb2, email_job_service_pb2, email_job_service_pb2_grpc
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.services.scheduler.changes import Changes, Made
from outbox_server.services.scheduler.explainer import Explainer
from outbox_server.services.scheduler.job_sets import JobSets
from outbox_server.services.scheduler.previewing import Previewer
from outbox_server.services.scheduler.servicers.calls import Context, acting_user
from outbox_server.services.scheduler.servicers.exporting import JobExporter
from outbox_server.services.scheduler.servicers.filtered_jobs import (
    audited_time,
    changed_jobs,
    listed_jobs,
    new_time,
)
from outbox_server.services.scheduler.servicers.job_audit import JobEvents
from outbox_server.services.scheduler.servicers.job_cancelling import JobCanceller
from outbox_server.services.scheduler.servicers.job_mapping import (
    changed_job,
    to_attempt,
    to_explanation,
    to_job,
)
from outbox_server.services.scheduler.servicers.preview_mapping import to_mail
from outbox_server.services.scheduler.storage import email_jobs as storage
from outbox_server.services.scheduler.storage.access import in_transaction
from outbox_server.services.scheduler.storage.email_jobs import JobRecord
from outbox_server.services.scheduler.storage.reopening import (
    keeping_quota,
    lock_sendable,
    resolve,
)
from outbox_server.shared.callers import in_parts
from outbox_server.shared.database.engine import snapshot
from outbox_server.shared.database.message_ids import installation_id
from outbox_server.shared.database.ownership import bind_call
from outbox_server.shared.errors import FailedPrecondition, InvalidInput, NotFound, Violations
from outbox_server.shared.filters.resources import ATTEMPT_FIELDS, ATTEMPT_ORDERS, checked_list
from outbox_server.shared.heads.loader import HeadLoader, load_soon
from outbox_server.shared.rpc.paging import requested_page
from outbox_server.shared.rpc.proto_mapping import id_text, not_found, parse_id
from outbox_server.shared.states import JobState
from outbox_server.shared.user_quotas import UserQuotas

_RESOLUTIONS: Final = {
    email_job_service_pb2.UNCERTAIN_RESOLUTION_SENT: JobState.SENT,
    email_job_service_pb2.UNCERTAIN_RESOLUTION_RESEND: JobState.SCHEDULED,
}
# The new state of jobs, for the audit log.
_RETRIED: Final = {"state": JobState.SCHEDULED.name}
_CANCELLED: Final = {"state": JobState.CANCELLED.name}


class EmailJobServicer(email_job_service_pb2_grpc.EmailJobServiceServicer):
    """Reads, cancels, retries, resolves and explains jobs."""

    def __init__(
        self,
        engine: AsyncEngine,
        loader: HeadLoader,
        explainer: Explainer,
        quotas: UserQuotas,
        *,
        changes: Changes,
        sets: JobSets,
        canceller: JobCanceller,
        exporter: JobExporter,
        previewer: Previewer,
    ) -> None:
        """`quotas` are the defaults, for users without overrides."""
        self._changes = changes
        self._sets = sets
        self._canceller = canceller
        self._exporter = exporter
        self._previewer = previewer
        self._quotas = quotas
        self._engine = engine
        self._explainer = explainer
        self._loader = loader
        self._installation_id: str | None = None

    async def GetEmailJob(
        self,
        request: email_job_service_pb2.GetEmailJobRequest,
        context: Context,
    ) -> email_job_pb2.EmailJob:
        """Return one job."""
        user_id = acting_user(request.user_id)
        job_id = parse_id(request.email_job_id, "email_job_id")
        async with self._engine.connect() as connection:
            found = await storage.read_job(connection, job_id, user_id)
        if found is None:
            raise not_found("email_job_id", request.email_job_id)
        return to_job(found, await self._installation())

    async def RenderEmailJob(
        self,
        request: email_job_service_pb2.RenderEmailJobRequest,
        context: Context,
    ) -> email_job_pb2.RenderedMail:
        """Return the mail of one job, as it would be sent now."""
        user_id = acting_user(request.user_id)
        job_id = parse_id(request.email_job_id, "email_job_id")
        return to_mail(await self._previewer.render_job(job_id, user_id))

    async def ListEmailJobs(
        self,
        request: email_job_service_pb2.ListEmailJobsRequest,
        context: Context,
    ) -> email_job_service_pb2.ListEmailJobsResponse:
        """Return one page of jobs."""
        which = listed_jobs(request)
        # Nothing is read if no job can match.
        bind_call(which.user_id)
        filters = (request.sender_id, request.batch_id, request.state, request.recipient)
        page = requested_page(request, "email_jobs", which.user_id, *filters, start=which.start)
        async with snapshot(self._engine) as connection:
            found, reached = await storage.list_jobs(connection, which, page.after, page.limit)
        shown, token = page.cut(found, lambda each: each[0], reached)
        installation = await self._installation()
        return email_job_service_pb2.ListEmailJobsResponse(
            email_jobs=await in_parts(shown, lambda each: to_job(each[1], installation)),
            next_page_token=token,
        )

    async def ExportEmailJobs(
        self,
        request: email_job_service_pb2.ExportEmailJobsRequest,
        context: Context,
    ) -> AsyncIterator[email_job_service_pb2.ExportEmailJobsResponse]:
        """Stream the jobs that match."""
        async for message in self._exporter.export(request, self._installation):
            yield message

    async def CancelEmailJob(
        self,
        request: email_job_service_pb2.CancelEmailJobRequest,
        context: Context,
    ) -> email_job_pb2.EmailJob:
        """Cancel a waiting job."""
        return await self._canceller.cancel(request)

    async def RetryEmailJobs(
        self,
        request: email_job_service_pb2.RetryEmailJobsRequest,
        context: Context,
    ) -> email_job_service_pb2.RetryEmailJobsResponse:
        """Schedule failed jobs again."""
        in_parts = bool(request.filter or request.validate_only or request.page_token)
        which, part = changed_jobs(
            request,
            "retry",
            partial(_check_ids, request, allowed=not in_parts),
            ids="email_job_ids",
        )
        events = JobEvents(self._changes, request, which.user_id, _RETRIED, was=JobState.FAILED)

        async def retry() -> Made[email_job_service_pb2.RetryEmailJobsResponse]:
            if not in_parts:
                retried = await self._sets.retry_all(which, _named_ids(request), events.record)
                return events.made(
                    email_job_service_pb2.RetryEmailJobsResponse(
                        retried_count=retried.jobs, skipped_count=retried.skipped
                    )
                )
            done = await self._sets.retry(
                which, part.after, events.record, count_only=request.validate_only
            )
            answer = email_job_service_pb2.RetryEmailJobsResponse(
                retried_count=done.jobs, next_page_token=part.token(done.reached)
            )
            return events.made(answer)

        return await self._changes.make_in_parts(
            request, which.user_id, email_job_service_pb2.RetryEmailJobsResponse, retry
        )

    async def CancelEmailJobs(
        self,
        request: email_job_service_pb2.CancelEmailJobsRequest,
        context: Context,
    ) -> email_job_service_pb2.CancelEmailJobsResponse:
        """Cancel the waiting jobs that match a filter."""
        which, part = changed_jobs(request, "cancel")
        events = JobEvents(self._changes, request, which.user_id, _CANCELLED)

        async def cancel() -> Made[email_job_service_pb2.CancelEmailJobsResponse]:
            done = await self._sets.cancel(
                which, part.after, events.record, count_only=request.validate_only
            )
            answer = email_job_service_pb2.CancelEmailJobsResponse(
                cancelled_count=done.jobs, next_page_token=part.token(done.reached)
            )
            return events.made(answer)

        return await self._changes.make_in_parts(
            request, which.user_id, email_job_service_pb2.CancelEmailJobsResponse, cancel
        )

    async def RescheduleEmailJobs(
        self,
        request: email_job_service_pb2.RescheduleEmailJobsRequest,
        context: Context,
    ) -> email_job_service_pb2.RescheduleEmailJobsResponse:
        """Give the waiting jobs that match a filter another due time."""
        which, part = changed_jobs(request, "reschedule", lambda: new_time(request))
        new = new_time(request)
        events = JobEvents(self._changes, request, which.user_id, audited_time(new))

        async def reschedule() -> Made[email_job_service_pb2.RescheduleEmailJobsResponse]:
            done = await self._sets.reschedule(
                which, part.after, new, events.record, count_only=request.validate_only
            )
            answer = email_job_service_pb2.RescheduleEmailJobsResponse(
                rescheduled_count=done.jobs, next_page_token=part.token(done.reached)
            )
            return events.made(answer)

        return await self._changes.make_in_parts(
            request,
            which.user_id,
            email_job_service_pb2.RescheduleEmailJobsResponse,
            reschedule,
            # Applied twice, a delay would be twice as long.
            repeatable=new.at is not None,
        )

    async def ResolveEmailJob(
        self,
        request: email_job_service_pb2.ResolveEmailJobRequest,
        context: Context,
    ) -> email_job_pb2.EmailJob:
        """Move a job out of UNCERTAIN, as the caller decides."""
        wanted = _RESOLUTIONS.get(request.resolution)
        if wanted is None:
            raise InvalidInput.field(
                "resolution",
                "must be UNCERTAIN_RESOLUTION_SENT or UNCERTAIN_RESOLUTION_RESEND",
                reason="RESOLUTION_INVALID",
            )
        user_id = acting_user(request.user_id)
        job_id = parse_id(request.email_job_id, "email_job_id")

        async def decide(connection: AsyncConnection) -> Made[email_job_pb2.EmailJob]:
            job = await storage.read_job(connection, job_id, user_id)
            if job is None:
                raise not_found("email_job_id", request.email_job_id)
            if wanted is JobState.SCHEDULED:
                async with keeping_quota(connection, job.batch_id, self._quotas) as added:
                    moved = await _resend(connection, job)
                    added.append(int(moved))
            else:
                moved = await resolve(connection, job_id, wanted)
            job = await storage.read_job(connection, job_id, user_id) or job
            if not moved:
                raise FailedPrecondition(
                    f"only an UNCERTAIN job can be resolved; this job is {job.state.name}",
                    reason="NOT_UNCERTAIN",
                    metadata={"email_job_id": request.email_job_id, "state": job.state.name},
                )
            # Read in this transaction and not cached, because the transaction may be rolled back.
            installation = self._installation_id or await installation_id(connection)
            return replace(
                changed_job(to_job(job, installation), JobState.UNCERTAIN),
                afterwards=partial(load_soon, self._loader, [job.sender_id]),
            )

        return await self._changes.make(request, user_id, email_job_pb2.EmailJob, decide)

    async def ListAttempts(
        self,
        request: email_job_service_pb2.ListAttemptsRequest,
        context: Context,
    ) -> email_job_service_pb2.ListAttemptsResponse:
        """Return one page of a job's attempts."""
        wrong = Violations()
        user_id = wrong.value(lambda: acting_user(request.user_id), None)
        job_id = wrong.value(lambda: parse_id(request.email_job_id, "email_job_id"), 0)
        tree, descending = checked_list(request, ATTEMPT_FIELDS, ATTEMPT_ORDERS, wrong)
        wrong.raise_any()
        page = requested_page(
            request, "attempts", user_id, job_id, start=(0,), largest=storage.MAX_ATTEMPTS
        )
        async with self._engine.connect() as connection:
            if not await storage.job_exists(connection, job_id, user_id):
                raise not_found("email_job_id", request.email_job_id)
            found, reached = await storage.list_attempts(
                connection, job_id, tree, *page.after, page.limit, descending=descending
            )
        shown, token = page.cut(
            found, lambda attempt: (attempt.number,), None if reached is None else (reached,)
        )
        return email_job_service_pb2.ListAttemptsResponse(
            attempts=[to_attempt(request.email_job_id, attempt) for attempt in shown],
            next_page_token=token,
        )

    async def ExplainEmailJob(
        self,
        request: email_job_service_pb2.ExplainEmailJobRequest,
        context: Context,
    ) -> email_job_service_pb2.ExplainEmailJobResponse:
        """Return what a job waits for, and when it will be sent."""
        user_id = acting_user(request.user_id)
        job_id = parse_id(request.email_job_id, "email_job_id")
        found = await self._explainer.explain(job_id, user_id)
        if found is None:
            raise not_found("email_job_id", request.email_job_id)
        return to_explanation(found, await self._installation())

    async def _installation(self) -> str:
        """Return the part that all Message-IDs of this installation share. It never changes."""
        if self._installation_id is None:
            self._installation_id = await in_transaction(self._engine, installation_id)
        return self._installation_id


async def _resend(connection: AsyncConnection, job: JobRecord) -> bool:
    """Schedule an UNCERTAIN job again. Return whether it was UNCERTAIN.

    Raises:
        FailedPrecondition: NOTHING_MORE_IS_SENT, RECIPIENT_ERASED.
    """
    if await lock_sendable(connection, job.batch_id) is None:
        raise FailedPrecondition(
            "this job cannot be sent again: its batch is cancelled, or its sender is deleted",
            reason="NOTHING_MORE_IS_SENT",
            metadata={"batch_id": id_text(job.batch_id)},
        )
    if not job.recipient:
        raise FailedPrecondition(
            "this job cannot be sent again: its recipient was erased",
            reason="RECIPIENT_ERASED",
            metadata={"email_job_id": id_text(job.job_id)},
        )
    return await resolve(connection, job.job_id, JobState.SCHEDULED)


def _check_ids(request: email_job_service_pb2.RetryEmailJobsRequest, *, allowed: bool) -> None:
    if request.email_job_ids and not allowed:
        raise InvalidInput.field(
            "email_job_ids",
            "cannot be combined with `filter` and `validate_only`",
            reason="FILTER_INVALID",
        )


def _named_ids(request: email_job_service_pb2.RetryEmailJobsRequest) -> Sequence[int] | None:
    """Return the jobs that the request names; None means any. Malformed ids are left out."""
    if not request.email_job_ids:
        return None
    ids = []
    for text in request.email_job_ids:
        with suppress(NotFound):
            ids.append(parse_id(text, "email_job_ids"))
    return ids
