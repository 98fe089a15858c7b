"""Ids and Message-IDs after a dump was restored that lacks the last commits, and of another
installation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import psycopg
from redis.asyncio import Redis

from outbox_server.deploy.embedded.inbox import Inbox
from tests.conftest import Stores
from tests.dispatchers import options, running, settings_of
from tests.eventually import eventually
from tests.fault.test_backup import postgres_tool
from tests.scheduler_stack import Scheduler, running_scheduler

ROWS = 20


@dataclass
class Issued:
    """The ids that a database has at one time."""

    senders: set[int] = field(default_factory=set)
    batches: set[int] = field(default_factory=set)
    jobs: set[int] = field(default_factory=set)

    @property
    def all(self) -> set[int]:
        return self.senders | self.batches | self.jobs


def issued(scheduler: Scheduler, *, without: Issued | None = None) -> Issued:
    """Return the ids that the database has, apart from those of `without`."""
    known = Issued() if without is None else without

    def ids(table: str) -> set[int]:
        return {one for (one,) in scheduler.rows(f"SELECT id FROM {table}")}

    return Issued(
        ids("senders") - known.senders,
        ids("batches") - known.batches,
        ids("email_jobs") - known.jobs,
    )


@asynccontextmanager
async def installation(database_url: str, redis_url: str, inbox: Inbox) -> AsyncIterator[Scheduler]:
    """Run a scheduler and a dispatcher."""
    values = options(database_url, redis_url, inbox.url, log_level="error")
    async with (
        running_scheduler(database_url, redis_url, min_gap="0") as scheduler,
        running(settings_of(values)),
    ):
        yield scheduler


async def schedule(scheduler: Scheduler, name: str) -> None:
    """Schedule a batch of a new sender; each mail has another recipient."""
    rows = "".join(f"{name}{i}@example.org\n" for i in range(ROWS))
    await scheduler.schedule(await scheduler.sender(), f"email\n{rows}")


async def send(scheduler: Scheduler, inbox: Inbox, name: str) -> None:
    """Schedule a batch, and wait until it is sent."""
    before = len(inbox.mails)
    await schedule(scheduler, name)
    await eventually(lambda: len(inbox.mails) >= before + ROWS)
    await eventually(lambda: not scheduler.value("SELECT count(*) FROM email_jobs WHERE state < 3"))


async def test_no_id_and_no_message_id_is_issued_twice_by_a_restored_or_another_installation(
    stores: Stores,
    new_database: Callable[[], str],
    redis: Redis,
    inbox: Inbox,
    tmp_path: Path,
) -> None:
    dump = tmp_path / "outbox.dump"
    source, redis_url = new_database(), stores.redis.url
    async with installation(source, redis_url, inbox) as scheduler:
        await send(scheduler, inbox, "kept")
        kept = issued(scheduler)
        as_superuser = source.replace("outbox@", "postgres@")
        await postgres_tool(stores, "pg_dump", "-Fc", "-f", str(dump), as_superuser)
        await send(scheduler, inbox, "lost")
        lost = issued(scheduler, without=kept)
    await redis.flushall()

    restored = new_database()
    with psycopg.connect(restored, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    target = restored.replace("outbox@", "postgres@")
    await postgres_tool(stores, "pg_restore", "-d", target, "--exit-on-error", str(dump))
    with psycopg.connect(restored) as connection:
        (beats,) = connection.execute("SELECT max(number) FROM heartbeat").fetchone() or (0,)
    async with installation(restored, redis_url, inbox) as scheduler:
        assert issued(scheduler) == kept
        # Nothing waits, so it is not held.
        await eventually(lambda: scheduler.value("SELECT max(number) FROM heartbeat") > beats)
        await send(scheduler, inbox, "new")
        new = issued(scheduler, without=kept)
    await redis.flushall()

    async with running_scheduler(new_database(), redis_url) as scheduler:
        await schedule(scheduler, "other")
        other = issued(scheduler)

    for one in (kept, lost, new, other):
        assert (len(one.senders), len(one.batches), len(one.jobs)) == (1, 1, ROWS)
    for one, another in combinations((kept, lost, new, other), 2):
        assert not one.all & another.all
    # Every mail went to another recipient, and has a Message-ID of its own.
    assert Counter(len(mail.rcpt_tos) for mail in inbox.mails) == {1: 3 * ROWS}
    assert len({mail.rcpt_tos[0] for mail in inbox.mails}) == 3 * ROWS
    assert len({mail.message_id for mail in inbox.mails}) == 3 * ROWS
