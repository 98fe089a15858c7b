"""`outbox purge` and `outbox erase`."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from outbox_server.shared.states import JobState
from tests.commands import CommandResult, outbox, run
from tests.eventually import eventually
from tests.scheduler_stack import Scheduler, running_scheduler

TABLES = ("email_jobs", "attempts", "batches", "batch_rejections")


async def old_and_new(scheduler: Scheduler) -> None:
    """Schedule two batches; the mail of the first one was sent in January."""
    sender = await scheduler.sender("ann")
    for _ in range(2):
        await scheduler.schedule(sender, "email\na@b.org\nc@d.org\nbroken\n")
    scheduler.execute(
        "WITH old AS (UPDATE email_jobs SET state = 3, attempt = 1, finished_at = '2026-01-05Z'"
        " WHERE batch_id = (SELECT min(id) FROM batches) RETURNING *) INSERT INTO attempts"
        " (email_job_id, attempt, sender_id, started_at, ended_at, outcome, counted)"
        " SELECT id, 1, sender_id, finished_at, finished_at, 1, true FROM old"
    )
    scheduler.execute(
        "UPDATE batches SET created_at = '2026-01-03Z' WHERE id = (SELECT min(id) FROM batches)"
    )
    scheduler.execute("DELETE FROM count_deltas")


def sizes(scheduler: Scheduler) -> list[Any]:
    return [scheduler.value(f"SELECT count(*) FROM {table}") for table in TABLES]


async def purge(*words: str) -> CommandResult:
    return await asyncio.to_thread(run, ["purge", *words])


async def test_purge_shows_what_it_would_remove_and_removes_it(
    database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTBOX_DATABASE_URL", database_url)
    async with running_scheduler(database_url, redis_url) as scheduler:
        await old_and_new(scheduler)
        found = {"jobs": 2, "attempts": 2, "batches": 1, "rejections": 1}
        months = [{"month": "2026-01", **found}]

        planned = await purge("--older-than", "30d", "--dry-run", "-o", "json")
        assert json.loads(planned.stdout) == {
            "older_than": "30d",
            "dry_run": True,
            **found,
            "months": months,
        }
        assert sizes(scheduler) == [4, 2, 2, 2]

        monkeypatch.setenv("OUTBOX_RETENTION", "30d")
        done = await purge("-o", "json")
        assert json.loads(done.stdout) == {
            "older_than": "30d",
            "dry_run": False,
            **found,
            "months": months,
        }
        assert "jobs: 2 of 2" in done.stderr
        assert sizes(scheduler) == [2, 0, 1, 1]

        again = await purge()
        assert (again.exit_code, again.stdout) == (0, "")
        assert "nothing is older than 30d" in again.stderr


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ((), "OUTBOX_RETENTION is not set"),
        (("--older-than", "2h"), "at least 1d"),
        (("--older-than", "soon"), "'soon' is not a duration"),
    ],
)
async def test_purge_refuses_an_invalid_age(words: tuple[str, ...], complaint: str) -> None:
    refused = await purge(*words)
    assert refused.exit_code == 2
    assert complaint in " ".join(refused.stderr.replace("│", " ").split())


async def test_erase_waits_for_mail_that_is_being_sent(database_url: str, redis_url: str) -> None:
    async with running_scheduler(database_url, redis_url) as scheduler:
        sender = await scheduler.sender("ann")
        await scheduler.schedule(sender, "email\na@b.org\nA@b.org\n", duplicates=2)
        scheduler.execute(
            "UPDATE email_jobs SET state = 2, attempt = 1, lease_until = now() WHERE row_number = 1"
        )
        erasing = asyncio.create_task(
            outbox(scheduler, "erase", "a@b.org", "--user", "ann", "-o", "json")
        )
        await eventually(lambda: scheduler.rows("SELECT 1 FROM email_jobs WHERE recipient = ''"))
        assert not erasing.done()
        scheduler.execute(
            "UPDATE email_jobs SET state = 3, lease_until = NULL, finished_at = now()"
            " WHERE state = 2"
        )
        done = await erasing
        answer = json.loads(done.stdout)
        assert (answer["erased_count"], answer["suppressed_count"]) == ("2", "1")
        assert answer["in_flight_count"] == "0"
        assert answer["suppression"]["email"].startswith("erased:")
        states = scheduler.rows("SELECT recipient, state FROM email_jobs ORDER BY state")
        assert states == [("", JobState.SENT), ("", JobState.SUPPRESSED)]
