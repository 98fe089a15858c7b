"""`outbox audit` on a real PostgreSQL, with one promise broken at a time."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from outbox_server.cli.main import app
from outbox_server.deploy.record import KeptMails, ReceivedMail
from outbox_server.services.scheduler.storage.cancelling import cancel_batch, sweep
from outbox_server.shared.audit.installation import audit_installation
from outbox_server.shared.audit.report import AuditReport
from outbox_server.shared.database.counts import sender_counts
from outbox_server.shared.database.message_ids import installation_id, message_id_for
from outbox_server.shared.retention.purging import Purger
from outbox_server.shared.settings import Settings, load_settings
from outbox_server.shared.states import AttemptOutcome, JobState
from tests.world import World, address_of

GAP = timedelta(seconds=2)
RECEIVER_ID = "3f9c2a1b04de"


@pytest.fixture
def settings(database_url: str, redis_url: str) -> Settings:
    return load_settings(
        database_url=database_url, redis_url=redis_url, rate_window="10s", min_gap="2s", lease="1s"
    )


class SentHistory:
    """An installation with sent mail: the time of every job, and the mails on the SMTP side."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world = world
        self.record = folder / "record.jsonl"
        (folder / "receiver_id").write_text(f"{RECEIVER_ID}\n")
        self.mails: list[ReceivedMail] = []
        self._began = time.time() - 3600
        self._installation = ""

    async def prepare(self) -> None:
        async with self.world.engine.begin() as connection:
            self._installation = await installation_id(connection)

    async def sent(self, sender: int, *seconds: float) -> list[int]:
        """Record that a sender sent a mail at each of these seconds; each send took up to 0.1 s."""
        jobs = await self.world.schedule(sender, len(seconds), load=False)
        for job, second in zip(jobs, seconds, strict=True):
            await self.attempt(job, second, AttemptOutcome.SENT)
            await self.end(job, second, JobState.SENT)
            self.arrived(sender, job, second)
        return jobs

    async def sent_elsewhere(self, sender: int, *seconds: float) -> list[int]:
        """Do the same with a server whose mails the audit cannot see."""
        jobs = await self.world.schedule(sender, len(seconds), load=False)
        for job, second in zip(jobs, seconds, strict=True):
            await self.attempt(job, second, AttemptOutcome.SENT, "2.0.0 Ok: queued as 4XyZ")
            await self.end(job, second, JobState.SENT)
        return jobs

    async def attempt(
        self,
        job: int,
        second: float,
        outcome: AttemptOutcome,
        reply: str = f"2.0.0 OK: stored by {RECEIVER_ID}",
    ) -> None:
        await self.world.sql(
            "UPDATE email_jobs SET attempt = attempt + 1 WHERE id = %s AND state = 1", job
        )
        await self.world.sql(
            "INSERT INTO attempts (email_job_id, attempt, sender_id, started_at, ended_at, outcome,"
            " counted, message) SELECT id, greatest(attempt, (SELECT max(attempt) + 1 FROM attempts"
            " WHERE email_job_id = id)), sender_id, to_timestamp(%s), to_timestamp(%s), %s, true,"
            " %s FROM email_jobs WHERE id = %s",
            self._began + second,
            self._began + second + 0.1,
            int(outcome),
            reply,
            job,
        )

    async def end(self, job: int, second: float, state: JobState) -> None:
        await self.world.sql(
            "WITH ended AS (UPDATE email_jobs SET state = %s, finished_at = to_timestamp(%s)"
            " WHERE id = %s RETURNING *) INSERT INTO count_deltas (sender_id, batch_id, hour,"
            " state, n) SELECT sender_id, batch_id, date_trunc('hour', finished_at), way.state,"
            " way.n FROM ended, (VALUES (1, -1), (%s, 1)) AS way (state, n)",
            int(state),
            self._began + second + 0.1,
            job,
            int(state),
        )

    def arrived(self, sender: int, job: int, second: float, domain: str | None = None) -> None:
        address = address_of(sender)
        name = message_id_for(job, f"s@{domain}" if domain else address, self._installation)
        self.mails.append(
            ReceivedMail(
                started_at=self._began + second + 0.01,
                received_at=self._began + second + 0.09,
                mail_from=address,
                rcpt_tos=("r@y.test",),
                message_id=name,
                bytes=1,
                file=f"m{len(self.mails)}",
            )
        )

    async def audit(self, settings: Settings, *, smtp_side: bool = True) -> AuditReport:
        lines = (json.dumps(dataclasses.asdict(mail)) + "\n" for mail in self.mails)
        self.record.write_text("".join(lines))
        side = KeptMails(record=self.record) if smtp_side else None
        return AuditReport(await audit_installation(settings, side), settings)


@pytest.fixture
async def past(settings: Settings, tmp_path: Path) -> AsyncIterator[SentHistory]:
    async with World(settings) as world:
        past = SentHistory(world, tmp_path)
        await past.prepare()
        yield past


@pytest.fixture
async def sender(past: SentHistory) -> int:
    """A sender with at most 3 mails in 10 s and the minimum gap of 2 s, and three of its mails."""
    sender = await past.world.sender(limit=3)
    await past.sent(sender, 0, 2.5, 5)
    return sender


@pytest.mark.parametrize("smtp_side", [True, False])
async def test_kept_promises_pass(
    past: SentHistory, settings: Settings, sender: int, smtp_side: bool
) -> None:
    other = await past.world.sender(limit=1, gap_ms=5000)
    await past.sent(other, 0, 11)
    await past.world.schedule(other, 4, load=False)
    report = await past.audit(settings, smtp_side=smtp_side)
    assert report.broken == []
    document = report.document()
    assert {name: document[name] for name in ("accepted", "sent", "lost", "duplicates")} == {
        "accepted": 9,
        "sent": 5,
        "lost": 0,
        "duplicates": 0,
    }
    assert document["states"]["scheduled"] == 4
    assert document["least_gap_s"] == pytest.approx(2.42 if smtp_side else 2.4, abs=0.001)
    assert document["most_in_window"] == 3
    assert [one["sender_id"] for one in document["senders"]] == [str(sender), str(other)]


@pytest.mark.parametrize("smtp_side", [True, False])
async def test_a_short_gap_and_a_full_window_are_found(
    past: SentHistory, settings: Settings, sender: int, smtp_side: bool
) -> None:
    await past.sent(sender, 6.5)
    report = await past.audit(settings, smtp_side=smtp_side)
    assert len(report.broken) == 2
    assert "a gap of 1.4" in report.broken[0]
    assert "4 mails within 10s, more than 3" in report.broken[1]
    assert report.document()["overshoot"] == 1


async def test_sends_before_a_change_of_the_limits_are_not_checked(
    past: SentHistory, settings: Settings, sender: int
) -> None:
    await past.sent(sender, 6.5)
    # The limits are stricter than before, but the time of the change is not recorded.
    await past.world.change(sender, load=False, hourly_limit=2, min_gap_ms=3000)
    report = await past.audit(settings)
    assert report.broken == []
    assert [report.document()["senders"][0][name] for name in ("sends", "checked")] == [4, 0]


@pytest.mark.usefixtures("sender")
async def test_a_mail_that_never_arrived_is_lost(past: SentHistory, settings: Settings) -> None:
    gone = past.mails.pop(1)
    report = await past.audit(settings)
    assert report.document()["lost"] == 1
    assert "the SMTP side never saw" in report.broken[0]
    assert gone.message_id.split(".")[1] in report.broken[-1]


async def test_a_job_without_a_row_or_stuck_in_sending_is_lost(
    past: SentHistory, settings: Settings, sender: int
) -> None:
    gone, stuck = await past.world.schedule(sender, 2, load=False)
    await past.world.sql("DELETE FROM email_jobs WHERE id = %s", gone)
    await past.world.sql(
        "UPDATE email_jobs SET state = 2, lease_until = now() - interval '2 minutes' WHERE id = %s",
        stuck,
    )
    report = await past.audit(settings)
    assert report.document()["lost"] == 2
    # The counts by sender and by batch still include the deleted row.
    assert report.document()["stats_mismatch"] == 2


async def test_a_copy_is_allowed_only_after_doubt_and_with_the_same_message_id(
    past: SentHistory, settings: Settings, sender: int
) -> None:
    job = (await past.world.schedule(sender, 1, load=False))[0]
    await past.attempt(job, 20, AttemptOutcome.IN_DOUBT)
    past.arrived(sender, job, 20)
    await past.attempt(job, 23, AttemptOutcome.SENT)
    await past.world.sql("UPDATE email_jobs SET attempt = 2 WHERE id = %s", job)
    await past.end(job, 23, JobState.SENT)
    past.arrived(sender, job, 23)
    report = await past.audit(settings)
    assert report.broken == []
    assert (report.document()["duplicates"], report.document()["in_doubt"]) == (1, 1)

    past.arrived(sender, job, 26, domain="elsewhere.test")
    report = await past.audit(settings)
    figures = report.document()
    assert (figures["duplicates"], figures["duplicates_unexplained"]) == (2, 1)
    assert figures["message_ids_changed"] == 1


async def test_two_recorded_sends_of_one_job_are_found_without_the_smtp_side(
    past: SentHistory, settings: Settings, sender: int
) -> None:
    job = (await past.sent(sender, 30))[0]
    await past.attempt(job, 33, AttemptOutcome.SENT)
    report = await past.audit(settings, smtp_side=False)
    figures = report.document()
    assert (figures["duplicates_unexplained"], figures["contradictions"]) == (1, 1)
    assert "an attempt began after it was SENT" in report.broken[-1]


async def test_mail_sent_to_another_server_is_checked_only_in_postgresql(
    past: SentHistory, settings: Settings, sender: int
) -> None:
    own_server = await past.world.sender(limit=2)
    await past.sent_elsewhere(own_server, 0, 3, 11)
    found = (await past.audit(settings)).document()
    assert (found["broken"], found["lost"], found["sent"]) == ([], 0, 6)
    assert (found["seen"], found["sent_elsewhere"]) == (3, 3)
    checked_by = {one["sender_id"]: (one["checked_by"], one["sends"]) for one in found["senders"]}
    assert checked_by == {str(sender): ("smtp side", 3), str(own_server): ("postgresql", 3)}

    # Violations of gap and window and second sends are still found.
    job = (await past.sent_elsewhere(own_server, 4))[0]
    await past.attempt(job, 30, AttemptOutcome.SENT, "2.0.0 Ok: queued as 9AbC")
    found = (await past.audit(settings)).document()
    assert found["duplicates_unexplained"] == 1
    broken = "\n".join(found["broken"])
    assert "a gap of 0.900 s, less than 2 s" in broken
    assert "3 mails within 10s, more than 2" in broken


async def test_a_sender_whose_mail_went_to_two_servers_is_checked_on_all_its_mail(
    past: SentHistory, settings: Settings, sender: int
) -> None:
    # The time lies between a mail in the inbox and one that is missing there.
    await past.sent_elsewhere(sender, 6.5)
    found = (await past.audit(settings)).document()
    assert found["sent_elsewhere"] == 1
    assert [one["sends"] for one in found["senders"]] == [4]
    assert "a gap of 1.400 s, less than 2 s" in found["broken"][0]
    assert "4 mails within 10s, more than 3" in found["broken"][1]


async def test_a_mail_that_vanished_from_the_inbox_is_lost(
    past: SentHistory, settings: Settings, sender: int
) -> None:
    await past.sent_elsewhere(sender, 20)
    past.mails.pop()
    found = (await past.audit(settings)).document()
    assert (found["lost"], found["sent_elsewhere"]) == (1, 1)


@pytest.mark.usefixtures("sender")
async def test_all_mail_is_expected_in_a_maildir_of_an_unknown_server(
    past: SentHistory, settings: Settings
) -> None:
    (past.record.parent / "receiver_id").unlink()
    past.mails.pop()
    found = (await past.audit(settings)).document()
    assert (found["lost"], found["sent_elsewhere"]) == (1, 0)


@pytest.mark.usefixtures("sender")
async def test_a_count_that_is_off_by_one_is_found(past: SentHistory, settings: Settings) -> None:
    await past.world.sql(
        "UPDATE count_deltas SET n = n + 1 WHERE id = (SELECT max(id) FROM count_deltas)"
    )
    # The differences by sender, by batch and by hour.
    assert (await past.audit(settings)).document()["stats_mismatch"] == 3


async def test_audit_and_stats_agree_before_the_rows_of_a_cancelled_batch_are_updated(
    past: SentHistory, settings: Settings
) -> None:
    world = past.world
    sender = await world.sender(limit=100)
    await past.sent(sender, 0, 2.5)
    jobs = await world.schedule(sender, 4, load=False)
    batch = int((await world.job(jobs[0])).batch_id)
    # Sent, in doubt, and waiting again.
    await past.attempt(jobs[1], 20, AttemptOutcome.IN_DOUBT)
    past.arrived(sender, jobs[1], 20)
    async with world.engine.begin() as connection:
        assert await cancel_batch(connection, batch, None)

    async def agree() -> None:
        async with world.engine.connect() as connection:
            reported = (await sender_counts(connection, [sender]))[sender]
        report = await past.audit(settings)
        assert report.broken == []
        assert report.document()["states"] == {s.name.lower(): reported[s] for s in JobState}
        assert (reported.sent, reported.cancelled, reported.scheduled) == (2, 4, 0)

    await agree()
    # Jobs cancelled by their batch but not yet in their rows are compared too.
    for way in ("+", "-"):
        await world.sql(f"UPDATE count_deltas SET n = n {way} 1 WHERE batch_id = %s", batch)
        off = (await past.audit(settings)).document()["stats_mismatch"]
        assert off == (2 if way == "+" else 0)
    more = True
    while more:
        async with world.engine.begin() as connection:
            more = await sweep(connection, batch, 1)
        await agree()
    assert await world.sql("SELECT 1 FROM batch_cancellations") == []


@pytest.mark.usefixtures("sender")
async def test_the_command_reports_in_a_json_document_and_its_exit_code(
    past: SentHistory, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    await past.sent_elsewhere(await past.world.sender(), 0)
    await past.audit(settings)
    monkeypatch.setenv("OUTBOX_DATABASE_URL", settings.database_url)
    monkeypatch.setenv("OUTBOX_RATE_WINDOW", "10s")

    def run(*words: str) -> Any:
        # The command creates its own event loop.
        return CliRunner().invoke(app, ["audit", *words])

    kept = await asyncio.to_thread(run, "--record", str(past.record), "-o", "json")
    assert kept.exit_code == 0, kept.output
    assert json.loads(kept.stdout)["broken"] == []
    monkeypatch.setenv("OUTBOX_MIN_GAP", "3s")
    broken = await asyncio.to_thread(run, "--maildir", str(past.record.parent))
    assert broken.exit_code == 1
    assert "BROKEN: " in broken.stdout
    said = "1 mail went to other servers and is checked by PostgreSQL's record alone."
    assert said in " ".join(broken.stdout.split())
    assert "at least 3s (OUTBOX_MIN_GAP)" in broken.stdout
    missing = await asyncio.to_thread(run, "--record", "/no/such/file")
    assert missing.exit_code == 1


async def test_mails_of_removed_jobs_are_not_checked_but_their_counts_are(
    past: SentHistory, settings: Settings, sender: int
) -> None:
    # Its id is higher than the ids of all removed jobs.
    await past.world.schedule(sender, 1, load=False)
    await Purger(past.world.engine, timedelta(minutes=30)).purge_once()
    assert await past.world.states() == {JobState.SCHEDULED: 1}
    report = await past.audit(settings)
    assert report.broken == []
    assert report.document()["purged"] == 3
    # A mail of a job id beyond the removed jobs is still unknown.
    await past.world.sql("UPDATE purged_counts SET n = 2")
    broken = (await past.audit(settings)).broken
    assert any("1 mails belong to jobs that PostgreSQL does not have" in line for line in broken)
    assert any("counts differ" in line for line in broken)
    assert any("1 accepted jobs have no row" in line for line in broken)


@pytest.mark.parametrize("smtp_side", [False, True])
async def test_the_limits_that_all_senders_of_a_user_share_are_replayed(
    past: SentHistory, settings: Settings, smtp_side: bool
) -> None:
    one, two, other = (
        await past.world.sender(gap_ms=0),
        await past.world.sender(gap_ms=0),
        await past.world.sender(user="bert"),
    )
    await past.sent(one, 0, 6)
    await past.sent(two, 3, 9)
    await past.sent(other, 1, 5)
    past.mails.sort(key=lambda mail: mail.received_at)
    assert (await past.audit(settings, smtp_side=smtp_side)).broken == []
    limits = settings.model_copy(
        update={"user_hourly_limit": 3, "user_gap": timedelta(seconds=2, milliseconds=950)}
    )
    report = await past.audit(limits, smtp_side=smtp_side)
    gap = "2.920" if smtp_side else "2.900"
    found = [line for line in report.broken if "user" in line]
    expected = ["user anna: 4 mails within 10s, more than 3"]
    if smtp_side:
        expected = [f"user anna: a gap of {gap} s, less than 2.95 s", *expected]
    assert found == expected
    users = {one["user_id"]: one for one in report.document()["users"]}
    assert (users["anna"]["sends"], users["bert"]["sends"]) == (4, 2)
    # What an operator has set for one user takes precedence.
    await past.world.sql(
        "INSERT INTO users (user_id, hourly_limit, min_gap_ms) VALUES ('anna', 4, 0)"
    )
    assert (await past.audit(limits, smtp_side=smtp_side)).broken == []
