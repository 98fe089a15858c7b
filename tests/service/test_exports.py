"""Exports: each job once, also after an interruption, and on the command line."""

from __future__ import annotations

import csv
import io
import json
from typing import Any, Final

from outbox.v1.email_job_service_pb2 import (
    ExportedEmailJob,
    ExportEmailJobsRequest,
    ExportEmailJobsResponse,
)
from outbox.v1.suppression_service_pb2 import ExportSuppressionsRequest
from outbox_client import AsyncClient

from outbox_server.deploy.ports import free_port
from outbox_server.shared.states import JobState
from tests.commands import outbox
from tests.eventually import eventually
from tests.scheduler_stack import Scheduler, refusal_of, running_scheduler

JOBS: Final = 5_000


async def fill(scheduler: Scheduler, count: int, every: int, message: str) -> str:
    rows = "".join(f"r{n}@b.org\n" for n in range(1, count + 1))
    sender = await scheduler.sender()
    tags = {"external_id_column": "email", "labels": {"region": "north", "campaign": "spring"}}
    accepted = await scheduler.schedule(sender, f"email\n{rows}", **tags)
    await scheduler.schedule(await scheduler.sender("bob"))
    scheduler.end_jobs(JobState.FAILED, "mod(row_number, %s) = 0", every)
    scheduler.refuse_jobs(message, "mod(row_number, %s) = 0", every)
    return accepted.batch.batch_id


async def exported(
    scheduler: Scheduler, **fields: Any
) -> tuple[list[ExportedEmailJob], list[ExportEmailJobsResponse]]:
    request = ExportEmailJobsRequest(**{"user_id": "ann", **fields})
    messages = [each async for each in scheduler.jobs.ExportEmailJobs(request)]
    return [job for each in messages for job in each.exported_email_jobs], messages


async def test_an_export_has_each_job_once_with_its_last_attempt(scheduler: Scheduler) -> None:
    batch = await fill(scheduler, 1_300, 100, "no such user")
    jobs, messages = await exported(scheduler)
    assert [job.email_job.row_number for job in jobs] == list(range(1, 1_301))
    for job in jobs:
        failed = job.email_job.row_number % 100 == 0
        assert job.HasField("last_attempt") == failed
        if failed:
            assert job.last_attempt.email_job_id == job.email_job.email_job_id
            assert (job.last_attempt.smtp_code, job.last_attempt.message) == (550, "no such user")
    for message, left in zip(messages, (800, 300), strict=False):
        rest, _ = await exported(scheduler, resume_token=message.resume_token)
        assert rest == jobs[1_300 - left :]
    failed_jobs, _ = await exported(scheduler, user_id="", batch_id=batch, filter="state = FAILED")
    assert [job.email_job.row_number for job in failed_jobs] == list(range(100, 1_301, 100))
    # A stream of nothing has a message, too.
    nothing, empty = await exported(scheduler, user_id="cleo")
    assert (nothing, len(empty)) == ([], 1)
    assert [bool(each.resume_token) for each in messages] == [True, True, False]
    for fields, reason in (
        ({"resume_token": messages[0].resume_token, "user_id": "bob"}, "RESUME_TOKEN_INVALID"),
        (
            {"resume_token": messages[0].resume_token, "filter": "state = SENT"},
            "RESUME_TOKEN_INVALID",
        ),
        ({"resume_token": "x"}, "RESUME_TOKEN_INVALID"),
        ({"filter": "state ="}, "FILTER_INVALID"),
        ({"user_id": ""}, "USER_ID_REQUIRED"),
    ):
        request = ExportEmailJobsRequest(**{"user_id": "ann", **fields})
        refusal = await refusal_of(scheduler.jobs.ExportEmailJobs(request).read())
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", reason)


async def test_the_client_resumes_an_export_when_the_scheduler_restarts(
    database_url: str, redis_url: str
) -> None:
    place = {"scheduler_listen": f"127.0.0.1:{free_port()}"}
    found: list[int] = []
    async with running_scheduler(database_url, redis_url, **place) as first:
        # More than a connection holds, so that the first scheduler cannot finish.
        await fill(first, JOBS, 1, "x" * 4_000)
        client = AsyncClient(first.address)
        stream = client.export_email_jobs(ExportEmailJobsRequest(user_id="ann"))
        found.append((await anext(stream)).email_job.row_number)
    async with client, running_scheduler(database_url, redis_url, **place):
        found += [job.email_job.row_number async for job in stream]
        assert [each async for each in client.export_suppressions(_nothing())] == []
    assert found == list(range(1, JOBS + 1))


def _nothing() -> ExportSuppressionsRequest:
    return ExportSuppressionsRequest(user_id="ann")


async def test_the_command_line_writes_and_reads_exports(
    scheduler: Scheduler, tmp_path: Any
) -> None:
    batch = await fill(scheduler, 3, 2, "=HYPERLINK(1)")
    # As processes: the log of a scheduler in this process goes to stdout, too.
    done = await outbox(scheduler, "jobs", "export", "--user", "ann")
    assert (done.exit_code, done.stderr.strip()) == (0, "3 jobs")
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [(row["recipient"], row["state"], row["smtp_code"]) for row in rows] == [
        ("r1@b.org", "SCHEDULED", ""),
        ("r2@b.org", "FAILED", "550"),
        ("r3@b.org", "SCHEDULED", ""),
    ]
    assert [row["message"] for row in rows] == ["", "'=HYPERLINK(1)", ""]
    tags = [(row["external_id"], row["labels"], row["test"]) for row in rows]
    assert tags == [(f"r{n}@b.org", "campaign=spring, region=north", "no") for n in (1, 2, 3)]
    assert [row["dispatcher_id"] for row in rows] == ["", "", ""]
    words = ("--batch", batch, "--filter", "state = FAILED", "-o", "json")
    done = await outbox(scheduler, "jobs", "export", *words)
    (line,) = done.stdout.splitlines()
    document = json.loads(line)
    assert document["email_job"]["recipient"] == "r2@b.org"
    assert document["last_attempt"]["message"] == "=HYPERLINK(1)"

    done = await outbox(scheduler, "jobs", "export")
    assert (done.exit_code, done.stdout, "--user" in done.stderr) == (1, "", True)

    listed = tmp_path / "list.csv"
    listed.write_text("address;email;reason\nx;r1@b.org;moved\nx;bad;\nx;r3@b.org;\n")
    importing = ("suppressions", "import", str(listed), "--user", "ann", "--reason", "gone")
    done = await outbox(scheduler, *importing, "-o", "json")
    assert done.exit_code == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["created_count"], answer["rejected_count"]) == ("2", "1")
    assert answer["suppressed_job_count"] == "2"
    done = await outbox(scheduler, "suppressions", "export", "--user", "ann")
    assert [line.rpartition(",")[0] for line in done.stdout.splitlines()] == [
        "email,reason",
        "r1@b.org,moved",
        "r3@b.org,gone",
    ]
    piped = ("suppressions", "import", "-", "--user", "bob", "-o", "json")
    again = await outbox(scheduler, *piped, stdin=done.stdout.encode())
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout)["created_count"] == "2", again.stderr
    done = await outbox(scheduler, "suppressions", "get", "R1@b.org", "--user", "bob", "-o", "json")
    assert json.loads(done.stdout)["reason"] == "moved"
    done = await outbox(scheduler, "suppressions", "get", "r2@b.org", "--user", "bob")
    assert (done.exit_code, "SUPPRESSION_NOT_FOUND" in done.stderr) == (1, True)
    done = await outbox(scheduler, "suppressions", "import", "/nowhere.csv", "--user", "bob")
    assert (done.exit_code, "cannot be read" in done.stderr) == (1, True)
    await eventually(lambda: not scheduler.value("SELECT count(*) FROM head_markers"))
