"""Migrations from the first and every released revision, with rows, under load, while sending."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

import psycopg
import pytest

from bench.migration import FIRST, Writers, fill
from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.shared.audit.installation import audit_installation
from outbox_server.shared.audit.report import AuditReport
from outbox_server.shared.database.migrating import migrate
from outbox_server.shared.database.schema import REVISION
from release.revisions import all_revisions, released_revisions
from tests.dispatchers import options, running, settings_of
from tests.eventually import eventually
from tests.release_after import LAST, VERSIONS

# So many rows that building an index takes longer than all other steps.
ROWS = 60_000


def emptied(url: str) -> str:
    """Remove the schema of a database."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    return url


def indexes_of(url: str) -> set[str]:
    """Return the names of all indexes."""
    with psycopg.connect(url) as connection:
        rows = connection.execute("SELECT indexname FROM pg_indexes WHERE schemaname = 'public'")
        return {name for (name,) in rows}


def test_every_released_revision_still_exists() -> None:
    released = released_revisions()
    assert released
    assert set(released.values()) <= set(all_revisions())
    assert all_revisions()[-1] == REVISION


@pytest.mark.parametrize("revision", sorted({FIRST, *released_revisions().values()}))
async def test_an_installation_of_an_earlier_revision_keeps_its_rows_and_sends_its_mail(
    revision: str, new_database: Callable[[], str], redis_url: str, inbox: Inbox
) -> None:
    url = emptied(new_database())
    await asyncio.to_thread(migrate, url, revision=revision)
    fill(url, 40, senders=2, later="0 s")
    used = indexes_of(url)
    await asyncio.to_thread(migrate, url)
    # Processes of the earlier release may still search by them.
    assert used <= indexes_of(url)
    settings = settings_of(options(url, redis_url, inbox.url))
    before = AuditReport(await audit_installation(settings, None), settings)
    assert (before.broken, before.figures()["sent"]) == ([], 20)
    async with running(settings):
        await eventually(lambda: len(inbox.mails) == 20)
        await eventually(lambda: _open_jobs(url) == 0)
    after = AuditReport(await audit_installation(settings, None), settings)
    assert (after.broken, after.figures()["sent"]) == ([], 40)
    assert len({mail.message_id for mail in inbox.mails}) == 20


def test_no_migration_lets_a_writer_wait_for_a_second(new_database: Callable[[], str]) -> None:
    # On a machine that is short of processor time, even a step of a millisecond may hold its lock
    # for a second, in one try. A step that is too long does so in every try.
    for _ in range(3):
        url = emptied(new_database())
        migrate(url, revision=FIRST)
        fill(url, ROWS)
        writers = Writers(url)
        said: list[str] = []
        writers.run_beside(partial(migrate, url, say=said.append, more_versions=VERSIONS))
        assert said[-1].startswith(LAST)
        assert writers.statements > 20
        if not writers.refused:
            return
    raise AssertionError(f"{writers.refused} statements waited for a lock for a second")


def _open_jobs(url: str) -> int:
    with psycopg.connect(url, autocommit=True) as connection:
        row = connection.execute("SELECT count(*) FROM email_jobs WHERE state < 3").fetchone()
    assert row is not None
    return int(row[0])
