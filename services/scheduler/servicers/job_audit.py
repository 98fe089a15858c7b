"""The audit log of calls that change many jobs: one event for each part of a change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

from google.protobuf.message import Message
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.services.scheduler.changes import Changes, Made
from outbox_server.services.scheduler.servicers.filtered_jobs import JobsRequest
from outbox_server.services.scheduler.storage.job_sets import ChangedJobs, owner_of_senders
from outbox_server.shared.states import JobState

M = TypeVar("M", bound=Message)


class JobEvents:
    """Records each part of a change of many jobs, in the part's transaction.

    `owner` owns the jobs. A caller that acts for any user need not name it, because a batch or a
    sender has one owner.
    """

    def __init__(
        self,
        changes: Changes,
        request: Message,
        user_id: str | None,
        became: Mapping[str, Any],
        *,
        was: JobState = JobState.SCHEDULED,
    ) -> None:
        """`was` is the state that all jobs had, `became` what each of them got."""
        self._changes = changes
        self._request = request
        self._was = was
        self._became = became
        self.owner = user_id

    async def record(self, connection: AsyncConnection, done: ChangedJobs) -> None:
        """Record a part of a set of jobs."""
        if self.owner is None:
            self.owner = await owner_of_senders(connection, done.sender_ids)
        after: dict[str, Any] = {**self._became, "count": done.jobs}
        if self._jobs.filter:
            after["filter"] = self._jobs.filter
        before = {"state": self._was.name}
        part = Made(self._request, self._target, self.owner, before=before, after=after)
        await self._changes.record_part(connection, self._request, part)

    def made(self, answer: M) -> Made[M]:
        """Return the whole change, whose parts are recorded."""
        return Made(answer, self._target, self.owner, changed=False)

    @property
    def _jobs(self) -> JobsRequest:
        return cast(JobsRequest, self._request)

    @property
    def _target(self) -> str:
        ids: Sequence[str] = getattr(self._request, "email_job_ids", ())
        if len(ids) == 1:
            return f"email-jobs/{ids[0]}"
        if self._jobs.batch_id:
            return f"batches/{self._jobs.batch_id}"
        return f"senders/{self._jobs.sender_id}" if self._jobs.sender_id else ""
