"""Streams the changes of jobs to watching callers.

One loop per process reads for all watchers: a few statements each time, a few times a second, and
only while somebody watches. NOTIFY is not used: every commit of a dispatcher would take one lock of
the whole server, and a pooler in transaction mode does not pass it on.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from time import monotonic
from typing import Final

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.shared.callers import current_claimant, next_part
from outbox_server.shared.database.engine import DATABASE_ERRORS
from outbox_server.shared.errors import FailedPrecondition
from outbox_server.shared.events.horizon import Horizon
from outbox_server.shared.events.storage import (
    EventOutcome,
    EventPosition,
    EventQuery,
    JobEventRecord,
    is_valid,
    read_events,
    read_outcomes,
    removed_up_to,
)
from outbox_server.shared.fair_shares import Claimant
from outbox_server.shared.loops import Loop
from outbox_server.shared.rpc.watching import PAUSE, USER_READ
from outbox_server.shared.states import JobState

# How many events one look reads for one watcher, and the most in one message.
PAGE: Final = 500
# How many events one look reads for all watchers together, because the event loop is blocked while
# they are read. Each watcher gets an equal part, of at least the second number.
_MOST_READ: Final = 500
_LEAST: Final = 10
# A watcher without events gets its position this often.
HEARTBEAT: Final = timedelta(seconds=15)
# Most transactions take a few ms: look again soon for those that were in progress.
_SOON: Final = timedelta(milliseconds=50)


@dataclass(frozen=True, slots=True)
class EventFilter:
    """Which events of a user to pass on. None and empty mean any."""

    user_id: str
    sender_id: int | None = None
    batch_id: int | None = None
    states: frozenset[JobState] = frozenset()

    def passes(self, event: JobEventRecord) -> bool:
        """Return whether the event is wanted."""
        return (
            (self.sender_id is None or event.sender_id == self.sender_id)
            and (self.batch_id is None or event.batch_id == self.batch_id)
            and (not self.states or event.state in self.states)
        )


@dataclass(frozen=True, slots=True)
class EventPage:
    """Some events in their order, and the position after them. Without events: a heartbeat."""

    position: EventPosition
    events: tuple[JobEventRecord, ...] = ()
    outcomes: Mapping[tuple[int, int], EventOutcome] = field(default_factory=dict)
    # Whether further events can be read at once.
    more: bool = False

    def outcome_of(self, event: JobEventRecord) -> EventOutcome | None:
        """Return how the event's attempt ended; None if it had none, or that is not known."""
        return self.outcomes.get((event.job_id or 0, event.attempt))


def expired() -> FailedPrecondition:
    """Return the error for a position after which not all events can be read any more."""
    return FailedPrecondition(
        "events after the resume_token were removed, or the database was restored to an earlier "
        "time; watch again without it, or with a start_time, and read the jobs that matter",
        reason="RESUME_TOKEN_EXPIRED",
    )


@dataclass(eq=False, slots=True)
class _EventWatcher:
    which: EventFilter
    owner: Claimant
    # None means to begin at the first position that is found.
    after: EventPosition | None
    # The next message. Nothing is read for the watcher while it has one.
    page: EventPage | None = None
    # When the caller took the last message. None means that it took none yet.
    sent_at: float | None = None
    is_expired: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def give(self, page: EventPage) -> None:
        self.page = page
        self.changed.set()


class EventWatch:
    """The watchers of one process."""

    def __init__(
        self,
        engine: AsyncEngine,
        retention: timedelta,
        *,
        pause: timedelta = PAUSE,
        heartbeat: timedelta = HEARTBEAT,
        page: int = PAGE,
    ) -> None:
        self._engine = engine
        self._retention = retention
        self._pause = pause
        self._heartbeat_s = heartbeat.total_seconds()
        self._most = page
        self._horizon = Horizon()
        # Whether another server may have answered since the positions were checked.
        self._unsure = False
        # An ordered set: the watchers are in the order in which they will be read.
        self._watchers: dict[_EventWatcher, None] = {}
        self._loop = Loop("watching events", self._try, errors=DATABASE_ERRORS)

    async def run(self, stop: asyncio.Event) -> None:
        """Read while somebody watches, until `stop`. Run it outside of calls, which all use it."""
        await self._loop.run(stop)

    async def follow(
        self, which: EventFilter, after: EventPosition | None
    ) -> AsyncGenerator[EventPage, None]:
        """Yield the position at once, then events as they are committed; never ends by itself.

        Raises:
            FailedPrecondition: RESUME_TOKEN_EXPIRED: the database was restored meanwhile.
        """
        watcher = _EventWatcher(which, current_claimant(), after)
        self._watchers[watcher] = None
        self._loop.wake()
        try:
            while True:
                await watcher.changed.wait()
                # Many watchers are woken at once.
                await next_part()
                watcher.changed.clear()
                if watcher.is_expired:
                    raise expired()
                page = watcher.page
                if page is not None:
                    yield page
                    watcher.page = None
                    watcher.sent_at = monotonic()
                    if page.more:
                        self._loop.wake()
        finally:
            self._watchers.pop(watcher, None)

    async def _try(self) -> timedelta | None:
        if not self._watchers:
            # Otherwise the next watcher would begin with the events since then.
            self._horizon.reset()
            return None
        try:
            return await self._look()
        except DATABASE_ERRORS:
            self._unsure = True
            raise

    async def _look(self) -> timedelta:
        async with self._engine.connect() as connection:
            self._unsure |= await self._horizon.advance(connection)
            horizon = self._horizon.position
            if self._unsure:
                await self._check_positions(connection)
                self._unsure = False
            if horizon is None:
                return _SOON
            again = await self._read(connection, horizon)
        if again:
            return timedelta(0)
        return _SOON if self._horizon.is_pending else self._pause

    async def _check_positions(self, connection: AsyncConnection) -> None:
        for watcher in list(self._watchers):
            after = watcher.after
            if after is not None and not await is_valid(
                connection, after, watcher.which.user_id, self._retention
            ):
                watcher.is_expired = True
                watcher.changed.set()

    async def _read(self, connection: AsyncConnection, horizon: EventPosition) -> bool:
        """Read the next events of some watchers. Return whether one of them has more."""
        watchers = self._next_watchers(horizon)
        if not watchers:
            return False
        queries = [EventQuery(watcher.which.user_id, after.event_id) for watcher, after in watchers]
        most = min(self._most, max(_MOST_READ // len(watchers), _LEAST))
        found = await read_events(connection, queries, horizon.event_id, most)
        removed = await removed_up_to(connection, [query.user_id for query in queries])
        wanted = [
            [event for event in events if watcher.which.passes(event)]
            for (watcher, _), events in zip(watchers, found, strict=True)
        ]
        outcomes = await read_outcomes(connection, [one for events in wanted for one in events])
        for (watcher, before), events, passing in zip(watchers, found, wanted, strict=True):
            if before.event_id < removed.get(watcher.which.user_id, 0):
                watcher.is_expired = True
                watcher.changed.set()
                continue
            more = len(events) == most
            # At the time of the horizon, all events up to this one were committed, too.
            after = EventPosition(events[-1].event_id, horizon.at) if more else horizon
            watcher.after = after
            if passing or self._needs_heartbeat(watcher):
                watcher.give(EventPage(after, tuple(passing), _of(passing, outcomes), more))
        return any(len(events) == most for events in found)

    def _needs_heartbeat(self, watcher: _EventWatcher) -> bool:
        return watcher.sent_at is None or monotonic() - watcher.sent_at >= self._heartbeat_s

    def _next_watchers(self, horizon: EventPosition) -> list[tuple[_EventWatcher, EventPosition]]:
        """Return the watchers to read for now: of each user at most USER_READ, in turns.

        Those whose last message was not taken yet are left out. So are those that are past the
        horizon, because another process gave them their position. New ones first get the position
        at which they begin.
        """
        read: list[tuple[_EventWatcher, EventPosition]] = []
        counts: Counter[Claimant] = Counter()
        for watcher in list(self._watchers):
            if watcher.page is not None or watcher.is_expired:
                continue
            after = watcher.after = watcher.after or horizon
            if watcher.sent_at is None or (
                after.event_id > horizon.event_id and self._needs_heartbeat(watcher)
            ):
                watcher.give(EventPage(after, more=True))
            elif after.event_id <= horizon.event_id and (
                counts[watcher.owner] < USER_READ or watcher.owner.privileged
            ):
                counts[watcher.owner] += 1
                read.append((watcher, after))
        for watcher, _ in read:
            del self._watchers[watcher]
            self._watchers[watcher] = None
        return read


def _of(
    events: list[JobEventRecord], outcomes: Mapping[tuple[int, int], EventOutcome]
) -> Mapping[tuple[int, int], EventOutcome]:
    keys = {(event.job_id or 0, event.attempt) for event in events}
    return {key: outcomes[key] for key in keys if key in outcomes}
