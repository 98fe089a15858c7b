"""Posts events to webhooks. All schedulers share the work, by leases in PostgreSQL.

A lease is the `next_at` of the webhook's row. A process that dies loses it after a minute, and
another one posts the same events again. Each webhook has one request in progress at a time, and
each user a few, so that slow servers delay only the webhooks of their user.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, TypeAlias

import structlog
from google.protobuf.json_format import MessageToDict
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.services.scheduler.metrics import WebhookMetrics
from outbox_server.services.scheduler.storage import webhook_deliveries as storage
from outbox_server.services.scheduler.storage.webhook_deliveries import DeliveryRecord
from outbox_server.services.scheduler.storage.webhooks import LEASE, WebhookRecord
from outbox_server.services.scheduler.webhook_posts import (
    PostResult,
    WebhookConnection,
    WebhookMessage,
    WebhookPoster,
)
from outbox_server.services.scheduler.webhooks import message_id, pause_after, wait_before
from outbox_server.shared.callers import in_parts
from outbox_server.shared.database.engine import DATABASE_ERRORS
from outbox_server.shared.errors import FailedPrecondition
from outbox_server.shared.events.horizon import Horizon
from outbox_server.shared.events.mapping import to_job_event
from outbox_server.shared.events.storage import (
    EventOutcome,
    EventQuery,
    JobEventRecord,
    read_events,
    read_outcomes,
    removed_up_to,
)
from outbox_server.shared.events.watching import EventFilter
from outbox_server.shared.id_source import IdSource
from outbox_server.shared.loops import Loop
from outbox_server.shared.rpc.proto_mapping import id_text
from outbox_server.shared.secrets import SecretBox

_PAUSE: Final = timedelta(milliseconds=500)
# The pause while there are no webhooks. A new webhook wakes the process that created it.
_IDLE: Final = timedelta(seconds=5)
# How many webhooks one step looks at, how many are worked on at a time, and how many of one user.
_LOOKED_AT: Final = 1_000
_AT_ONCE: Final = 64
_AT_ONCE_PER_USER: Final = 2
# How many events are read at a time, and how many one request has.
_READ: Final = 500
MOST_EVENTS: Final = 100
# How many events are converted, in about 1 ms, before calls run.
_MAPPED_AT_ONCE: Final = 10
# No further request begins after this time. A request takes at most 20 s, so a lease suffices.
_LONGEST_RUN_S: Final = 20.0
# After work on a webhook, its user's place stays empty for a multiple of the time that
# the work took, within limits. Otherwise a quick receiver would keep the process busy.
_REST_RATIO: Final = 4
_LEAST_REST_S: Final = 0.05
_LONGEST_REST_S: Final = 0.25
# A webhook with too many failed deliveries is looked at again after this time.
_FULL: Final = timedelta(seconds=5)
_DRAIN_S: Final = 5.0
_GONE: Final = 410

_Outcomes: TypeAlias = Mapping[tuple[int, int], EventOutcome]

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
        # How many of the tasks in `_working` only rest.
        self._resting = 0
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
        free = _AT_ONCE - len(self._working) + self._resting
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
            claimed = await storage.claim(connection, picked, LEASE) if picked else ()
        for webhook in claimed:
            task = asyncio.create_task(self._work(webhook, horizon))
            self._working[task] = webhook
            task.add_done_callback(self._ended)
        return timedelta(0) if self._after else _PAUSE

    def _pick(self, waiting: Sequence[storage.WaitingWebhook], free: int) -> list[int]:
        """Return the webhooks to work on: a few of each user, those that rested longest first."""
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
        # The webhook may have more events, and another webhook of its user may now use its place.
        self._loop.wake()

    async def _work(self, webhook: WebhookRecord, horizon: int) -> None:
        begun = time.monotonic()
        try:
            await self._deliver(webhook, horizon, begun)
        except DATABASE_ERRORS as error:
            # The lease expires, and the work is done again.
            _log.warning("webhook_postponed", error=type(error).__name__)
        # The place of its user rests too. Otherwise a user with many webhooks would keep the
        # process busy.
        rest = (time.monotonic() - begun) * _REST_RATIO
        self._resting += 1
        try:
            await asyncio.sleep(min(max(rest, _LEAST_REST_S), _LONGEST_REST_S))
        finally:
            self._resting -= 1

    async def _deliver(self, webhook: WebhookRecord, horizon: int, begun: float) -> None:
        async with self._engine.connect() as connection:
            due, pending = await storage.read_due_delivery(connection, webhook.webhook_id)
        if due is not None:
            await self._try_again(webhook, due)
        elif pending >= storage.MOST_PENDING:
            await self._release(webhook, webhook.after_event, _FULL)
        elif webhook.after_event > horizon:
            # Another process has seen later events, or the database was restored.
            await self._release(webhook, webhook.after_event, _PAUSE)
        else:
            await self._post_next(webhook, horizon, begun)

    async def _try_again(self, webhook: WebhookRecord, due: DeliveryRecord) -> None:
        found = await self._read(webhook, due.after_event, due.last_event)
        events = found.events
        # If only some of its events are left, they are not posted: it would be another message with
        # the same id.
        removed = due.after_event < found.removed_to and len(events) < due.event_count
        if removed or not events:
            await self._give_up(webhook, due)
            return
        async with self._poster.connection(webhook.user_id) as connection:
            page = _Page(due.after_event, due.last_event, events[:MOST_EVENTS])
            result = await self._post(webhook, page, await self._outcomes(events), connection)
        wait = wait_before(due.attempts + 1, self._backoff)
        async with self._engine.begin() as connection:
            if not await self._end(connection, webhook, webhook.after_event, result):
                return
            if not result.error:
                await storage.end_delivery(connection, due.delivery_id)
                return
            await storage.fail_delivery(
                connection, due.delivery_id, wait, result.http_status, result.error
            )

    async def _give_up(self, webhook: WebhookRecord, due: DeliveryRecord) -> None:
        """Give up a delivery whose events were removed. The webhook is not paused for it."""
        async with self._engine.begin() as connection:
            if await storage.release(connection, webhook, after_event=webhook.after_event):
                await storage.fail_delivery(
                    connection, due.delivery_id, None, None, "its events were removed"
                )

    async def _post_next(self, webhook: WebhookRecord, horizon: int, begun: float) -> None:
        """Post the next events, in some requests over one connection."""
        found = await self._read(webhook, webhook.after_event, horizon)
        if webhook.after_event < found.removed_to:
            await self._post_removed(webhook, found.removed_to)
            return
        if not found.events:
            await self._release(webhook, found.reached)
            return
        outcomes = await self._outcomes(found.events)
        pages = found.pages(webhook.after_event)
        async with self._poster.connection(webhook.user_id) as connection:
            for number, page in enumerate(pages, 1):
                last = number == len(pages) or time.monotonic() - begun > _LONGEST_RUN_S
                result = await self._post(webhook, page, outcomes, connection, more=not last)
                if last or result.error:
                    break
                async with self._engine.begin() as transaction:
                    if not await storage.advance(transaction, webhook, page.last):
                        break
        await self._end_page(webhook, page, result)

    async def _end_page(self, webhook: WebhookRecord, page: _Page, result: PostResult) -> None:
        async with self._engine.begin() as connection:
            if not await self._end(connection, webhook, page.last, result) or not result.error:
                return
            failed = DeliveryRecord(
                delivery_id=self._ids.issue(),
                webhook_id=webhook.webhook_id,
                after_event=page.after,
                last_event=page.last,
                event_count=len(page.events),
                attempts=1,
                created_at=webhook.created_at,
                next_at=None,
                http_status=result.http_status,
                error=result.error,
            )
            await storage.add_delivery(connection, failed, wait_before(1, self._backoff))

    async def _post_removed(self, webhook: WebhookRecord, removed_to: int) -> None:
        """Tell the receiver that events were removed before they were posted, until it knows."""
        after = webhook.after_event
        async with self._poster.connection(webhook.user_id) as connection:
            result = await self._send(
                webhook,
                connection,
                message_id(webhook.webhook_id, after, removed_to),
                "email_jobs.events_removed",
                {
                    "webhook_id": id_text(webhook.webhook_id),
                    "last_removed_event_id": id_text(removed_to),
                },
            )
        async with self._engine.begin() as transaction:
            await self._end(transaction, webhook, after if result.error else removed_to, result)

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

    async def _read(self, webhook: WebhookRecord, after: int, last: int) -> _Found:
        """Return the next events for a webhook."""
        which = EventFilter(webhook.user_id, webhook.sender_id, None, webhook.states)
        query = EventQuery(webhook.user_id, after)
        async with self._engine.connect() as connection:
            (found,) = await read_events(connection, [query], last, _READ)
            removed = await removed_up_to(connection, (webhook.user_id,))
        return _Found(
            [event for event in found if which.passes(event)],
            found[-1].event_id if len(found) == _READ else last,
            removed.get(webhook.user_id, 0),
        )

    async def _outcomes(self, events: Sequence[JobEventRecord]) -> _Outcomes:
        async with self._engine.connect() as connection:
            return await read_outcomes(connection, events)

    async def _post(
        self,
        webhook: WebhookRecord,
        page: _Page,
        outcomes: _Outcomes,
        connection: WebhookConnection,
        *,
        more: bool = False,
    ) -> PostResult:
        def document(event: JobEventRecord) -> dict[str, Any]:
            proto = to_job_event(event, outcomes.get((event.job_id or 0, event.attempt)))
            return MessageToDict(proto, preserving_proto_field_name=True)

        documents = await in_parts(page.events, document, at_once=_MAPPED_AT_ONCE)
        return await self._send(
            webhook,
            connection,
            message_id(webhook.webhook_id, page.after, page.last),
            "email_jobs.changed",
            {"email_job_events": documents},
            more=more,
        )

    async def _send(
        self,
        webhook: WebhookRecord,
        connection: WebhookConnection,
        identifier: str,
        kind: str,
        data: dict[str, Any],
        *,
        more: bool = False,
    ) -> PostResult:
        try:
            secrets = webhook.secrets(self._secrets)
        except FailedPrecondition:
            return PostResult(None, "no key of OUTBOX_ENCRYPTION_KEYS decrypts its secret")
        message = WebhookMessage(
            url=webhook.url,
            message_id=identifier,
            kind=kind,
            data=data,
            secrets=secrets,
            user_id=webhook.user_id,
        )
        result = await connection.post(message, more=more)
        self._metrics.posted(succeeded=not result.error)
        return result


@dataclass(frozen=True, slots=True)
class _Page:
    """The events of one request: those after one id and up to another."""

    after: int
    last: int
    events: Sequence[JobEventRecord]


@dataclass(frozen=True, slots=True)
class _Found:
    """Some events for a webhook."""

    events: list[JobEventRecord]
    # All events up to this one were read.
    reached: int
    # Events of the user were removed up to this one.
    removed_to: int

    def pages(self, after: int) -> list[_Page]:
        """Return the requests with these events, which follow the event `after`."""
        pages: list[_Page] = []
        for start in range(0, len(self.events), MOST_EVENTS):
            events = self.events[start : start + MOST_EVENTS]
            is_last = start + MOST_EVENTS >= len(self.events)
            last = self.reached if is_last else events[-1].event_id
            pages.append(_Page(after, last, events))
            after = last
        return pages
