"""PostgreSQL returns with an earlier state, as after a failover to a replica that lagged.

Redis then knows jobs that PostgreSQL does not have, or has otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial

import psycopg
import pytest
from psycopg import sql

from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.shared.states import JobState
from tests.conftest import Stores
from tests.dispatchers import options, running, settings_of
from tests.eventually import eventually
from tests.world import World, at_least, jobs_in, mails_of

HOURS = timedelta(hours=2)


class Past:
    """A copy of a database, which can take the place of the database itself."""

    def __init__(self, stores: Stores, url: str) -> None:
        self._stores = stores
        with psycopg.connect(url) as connection:
            self.name = connection.info.dbname
        self._copy = f"{self.name}_past"

    def save(self) -> None:
        """Keep the present state."""
        self._empty(self.name)
        self._run("CREATE DATABASE {} TEMPLATE {} OWNER outbox", self._copy, self.name)
        self._run("ALTER DATABASE {} ALLOW_CONNECTIONS true", self.name)

    def restore(self) -> None:
        """Lose everything since then. Clients connect again, as after a failover."""
        self._empty(self.name)
        self._run("DROP DATABASE {} (FORCE)", self.name)
        self._run("ALTER DATABASE {} RENAME TO {}", self._copy, self.name)

    def _empty(self, name: str) -> None:
        self._run("ALTER DATABASE {} ALLOW_CONNECTIONS false", name)
        self._stores.administrate(
            sql.SQL(
                "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = {}"
            ).format(sql.Literal(name))
        )

    def _run(self, statement: str, *names: str) -> None:
        self._stores.administrate(sql.SQL(statement).format(*map(sql.Identifier, names)))


@pytest.fixture
def url(new_database: Callable[[], str]) -> str:
    return new_database()


@pytest.fixture
def past(stores: Stores, url: str) -> Past:
    return Past(stores, url)


async def test_overdue_mail_is_sent_and_mail_of_later_is_not_after_commits_were_lost(
    url: str, redis_url: str, inbox: Inbox, past: Past
) -> None:
    settings = settings_of(options(url, redis_url, inbox.url, min_gap="20ms"))
    async with World(settings) as world:
        sender, other = await world.sender(), await world.sender()
        async with running(settings):
            [sent] = await world.schedule(sender)
            await eventually(partial(at_least, 1, inbox.mails))
            await eventually(world.done)
        # So that Redis knows the senders all the time.
        [later] = await world.schedule(sender, due=HOURS)
        [others] = await world.schedule(other, due=HOURS)
        waiting = await world.schedule(sender, 3)
        await disconnect(world)
        past.save()
        await world.sql("SELECT")
        # These commits will be lost: three mails are sent, and three jobs are accepted.
        async with running(settings):
            await eventually(partial(at_least, 4, inbox.mails))
            await eventually(partial(all_sent, world, waiting))
        unknown = await world.schedule(other, 3)

        await disconnect(world)
        past.restore()
        await world.sql("SELECT")
        # Another job has the id of the first of the lost ones, and is due in two hours; the second
        # one belongs to another sender now; the third one is unknown.
        [now_later] = await world.schedule(other, load=False, due=HOURS)
        [now_anothers] = await world.schedule(sender, load=False)
        for job, its_id in ((now_later, unknown[0]), (now_anothers, unknown[1])):
            await world.sql("UPDATE email_jobs SET id = %s WHERE id = %s", its_id, job)
        async with running(settings):
            # The three overdue mails are sent again, since the record of their sending was lost,
            # and the one that was accepted since.
            await eventually(partial(at_least, 8, inbox.mails))
            await eventually(partial(all_sent, world, [*waiting, unknown[1]]))

            assert await world.in_state(JobState.SCHEDULED) == {later, others, unknown[0]}
            assert jobs_in(inbox.mails) == {
                sent: 1,
                **dict.fromkeys(waiting, 2),
                unknown[1]: 1,
            }
            assert mails_of(inbox.mails, other) == [], "its jobs are due in two hours"
            # The job waits for its own time.
            await world.sql("UPDATE email_jobs SET scheduled_at = now() WHERE id = %s", unknown[0])
            await world.loader.load([other], committed=True)
            await eventually(partial(at_least, 9, inbox.mails))


async def disconnect(world: World) -> None:
    """Close the connections to the database. The next statement of `World.sql` opens one."""
    await world._connection.close()
    await world.engine.dispose()


async def all_sent(world: World, jobs: list[int]) -> bool:
    return set(jobs) <= await world.in_state(JobState.SENT)
