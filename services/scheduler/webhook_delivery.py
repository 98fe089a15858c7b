"""Posts events to webhooks. All schedulers share the work, by leases in PostgreSQL.

A lease is the `next_at` of the webhook's row. A process that dies loses it after a minute, and
another one posts the same events again. Of each webhook one request is under way at a time, and of
each user a few, so that slow servers delay only the webhooks of their user.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Final

import structlog
from google.protobuf.json_format import MessageToDict
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.services.scheduler.metrics import WebhookMetrics
from outbox_server.services.scheduler.storage import webhooks as storage
from outbox_server.services.scheduler.storage.webhooks import DeliveryRecord, WebhookRecord
from outbox_server.services.scheduler.webhook_posts import (
    PostResult,
    WebhookMessage,
    WebhookPoster,
)
from outbox_server.services.scheduler.webhooks import message_id, pause_after, wait_before
from outbox_server.shared.database.engine import DATABASE_ERRORS
from outbox_server.shared.errors import FailedPrecondition
from outbox_server.shared.events.horizon import Horizon
from outbox_server.shared.events.mapping import to_job_event
from outbox_server.shared.events.storage import (
    EventQuery,
    JobEventRecord,
    read_events,
    read_outcomes,
)
from outbox_server.shared.events.watching import EventFilter
from outbox_server.shared.id_source import IdSource
from outbox_server.shared.loops import Loop
from outbox_server.shared.secrets import SecretBox

_PAUSE: Final = timedelta(milliseconds=500)
# As long as there are no webhooks. A new one wakes the process that created it.
_IDLE: Final = timedelta(seconds=5)
# How many webhooks one step looks at, how many are worked on at a time, and of one user.
_LOOKED_AT: Final = 1_000
_AT_ONCE: Final = 64
_AT_ONCE_PER_USER: Final = 2
# How many events are read at a time, and how many one request has.
_READ: Final = 500
MOST_EVENTS: Final = 100
# A webhook with too many failed deliveries is looked at again after so long.
_FULL: Final = timedelta(seconds=5)
_DRAIN_S: Final = 5.0
_GONE: Final = 410

_log = structlog.get_logger("outbox.webhooks")


class WebhookDelivery:
    """The worker of one process."""

    def __init__(
        self,
        engine: AsyncEngine,
        secrets: SecretBox,
        poster: WebhookPoster,
        backoff: Sequence[timedelta],
        *,
        ids: IdSource,
        metrics: WebhookMetrics,
    ) -> None:
        self._engine = engine
        self._secrets = secrets
        self._poster = poster
        self._backoff = backoff
        self._ids = ids
        self._metrics = metrics
        self._horizon = Horizon()
        # The last webhook that was looked at.
        self._after = 0
        self._working: dict[asyncio.Task[None], WebhookRecord] = {}
        self._loop = Loop("webhooks", self._step, errors=DATABASE_ERRORS)

    def wake(self) -> None:
        """Look for work now."""
        self._loop.wake()

    async def run(self, stop: asyncio.Event) -> None:
        """Post until `stop` is set. Then requests in progress may end."""
        try:
            await self._loop.run(stop)
            if self._working:
                await asyncio.wait(self._working, timeout=_DRAIN_S)
        finally:
            for task in self._working:
                task.cancel()
            await asyncio.gather(*self._working, return_exceptions=True)

    async def _step(self) -> timedelta:
        free = _AT_ONCE - len(self._working)
        if free <= 0:
            return _PAUSE
        async with self._engine.begin() as connection:
            await self._horizon.advance(connection)
            if self._horizon.position is None:
                return _PAUSE
            horizon = self._horizon.position.event_id
            found = await storage.find_work(connection, self._after, horizon, _LOOKED_AT)
            if not found and not self._after:
                return _IDLE
            self._after = found[-1].webhook_id if len(found) == _LOOKED_AT else 0
            picked = self._pick([one for one in found if one.has_work], free)
            claimed = await storage.claim(connection, picked, storage.LEASE) if picked else ()
        for webhook in claimed:
            task = asyncio.create_task(self._work(webhook, horizon))
            self._working[task] = webhook
            task.add_done_callback(self._ended)
        return timedelta(0) if self._after else _PAUSE

    def _pick(self, waiting: Sequence[storage.WaitingWebhook], free: int) -> list[int]:
        """Return the webhooks to work on: a few of each user, first those that rested longest."""
        counts = Counter(webhook.user_id for webhook in self._working.values())
        picked: list[int] = []
        for one in sorted(waiting, key=lambda each: each.next_at):
            if len(picked) < free and counts[one.user_id] < _AT_ONCE_PER_USER:
                counts[one.user_id] += 1
                picked.append(one.webhook_id)
        return picked

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._working[task]
        if not task.cancelled() and task.exception() is not None:
            _log.error("webhook_failed", exc_info=task.exception())
        # It may have more events, and another one of its user may have its place.
        self._loop.wake()

    async def _work(self, webhook: WebhookRecord, horizon: int) -> None:
        try:
            async with self._engine.connect() as connection:
                due, pending = await storage.read_due_delivery(connection, webhook.webhook_id)
            if due is not None:
                await self._try_again(webhook, due)
            elif pending >= storage.MOST_PENDING:
                await self._release(webhook, webhook.after_event, _FULL)
            else:
                await self._post_next(webhook, horizon)
        except DATABASE_ERRORS as error:
            # The lease expires, and the work is done again.
            _log.warning("webhook_postponed", error=type(error).__name__)

    async def _try_again(self, webhook: WebhookRecord, due: DeliveryRecord) -> None:
        events, _ = await self._read(webhook, due.after_event, due.last_event)
        if not events:
            result = PostResult(None, "its events were removed after OUTBOX_EVENT_RETENTION")
        else:
            result = await self._post(webhook, events, due.after_event, due.last_event)
        wait = wait_before(due.attempts + 1, self._backoff) if events else None
        async with self._engine.begin() as connection:
            if not await self._end(connection, webhook, webhook.after_event, result):
                return
            if not result.error:
                await storage.end_delivery(connection, due.delivery_id)
                return
            await storage.fail_delivery(
                connection, due.delivery_id, wait, result.http_status, result.error
            )

    async def _post_next(self, webhook: WebhookRecord, horizon: int) -> None:
        after = webhook.after_event
        if after > horizon:
            # Another process has seen later events, or the database was restored.
            await self._release(webhook, after, _PAUSE)
            return
        events, reached = await self._read(webhook, after, horizon)
        if not events:
            await self._release(webhook, reached)
            return
        result = await self._post(webhook, events, after, reached)
        async with self._engine.begin() as connection:
            if not await self._end(connection, webhook, reached, result) or not result.error:
                return
            failed = DeliveryRecord(
                delivery_id=self._ids.issue(),
                webhook_id=webhook.webhook_id,
                after_event=after,
                last_event=reached,
                event_count=len(events),
                attempts=1,
                created_at=webhook.created_at,
                next_at=None,
                http_status=result.http_status,
                error=result.error,
            )
            await storage.add_delivery(connection, failed, wait_before(1, self._backoff))

    async def _end(
        self, connection: AsyncConnection, webhook: WebhookRecord, after: int, result: PostResult
    ) -> bool:
        failed = bool(result.error)
        disable = result.http_status == _GONE
        if disable:
            _log.info("webhook_gone", webhook_id=webhook.webhook_id)
        return await storage.release(
            connection,
            webhook,
            after_event=after,
            pause=pause_after(webhook.failures + 1) if failed else timedelta(0),
            succeeded=not failed,
            error=result.error,
            disable=disable,
        )

    async def _release(
        self, webhook: WebhookRecord, after: int, pause: timedelta = timedelta(0)
    ) -> None:
        async with self._engine.begin() as connection:
            await storage.release(connection, webhook, after_event=after, pause=pause)

    async def _read(
        self, webhook: WebhookRecord, after: int, last: int
    ) -> tuple[list[JobEventRecord], int]:
        """Return the next events for a webhook, and the position after them."""
        which = EventFilter(webhook.user_id, webhook.sender_id, None, webhook.states)
        query = EventQuery(webhook.user_id, after)
        async with self._engine.connect() as connection:
            (found,) = await read_events(connection, [query], last, _READ)
        reached = found[-1].event_id if len(found) == _READ else last
        wanted = [event for event in found if which.passes(event)]
        if len(wanted) > MOST_EVENTS:
            wanted = wanted[:MOST_EVENTS]
            reached = wanted[-1].event_id
        return wanted, reached

    async def _post(
        self, webhook: WebhookRecord, events: Sequence[JobEventRecord], after: int, last: int
    ) -> PostResult:
        async with self._engine.connect() as connection:
            outcomes = await read_outcomes(connection, events)
        protos = [
            to_job_event(event, outcomes.get((event.job_id or 0, event.attempt)))
            for event in events
        ]
        documents = [MessageToDict(proto, preserving_proto_field_name=True) for proto in protos]
        try:
            secret = self._secrets.decrypt(webhook.secret)
        except FailedPrecondition:
            return PostResult(None, "no key of OUTBOX_ENCRYPTION_KEYS decrypts its secret")
        result = await self._poster.post(
            WebhookMessage(
                url=webhook.url,
                message_id=message_id(webhook.webhook_id, after, last),
                kind="email_jobs.changed",
                data={"email_job_events": documents},
                user_id=webhook.user_id,
                secret=secret,
            )
        )
        self._metrics.posted(succeeded=not result.error)
        return result
