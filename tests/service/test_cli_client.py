"""The commands that ask a scheduler, against a real one."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app
from deploy.local.ports import free_port
from services.stats.server import serve as serve_stats
from tests.scheduler_stack import Scheduler, running_scheduler

CSV = (
    "\ufeffE-Mail;First Name;note\r\n"
    'a@b.org;Ann;"one; two"\r\n'
    "\r\n"
    'broken;Bob;"two\r\nlines"\r\n'
    "c@d.org;Cid;\r\n"
    ";Dan;x\r\n"
    "e@f.org;Eve\r\n"
)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
async def scheduler(database_url: str, redis_url: str) -> AsyncIterator[Scheduler]:
    async with running_scheduler(database_url, redis_url, stats_listen="127.0.0.1:0") as running:
        yield running


@pytest.fixture
async def stats(scheduler: Scheduler) -> AsyncIterator[str]:
    """The address of a stats service beside the scheduler."""
    stop = asyncio.Event()
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    async with asyncio.TaskGroup() as group:
        group.create_task(serve_stats(scheduler.settings, stop, ready=port.set_result))
        yield f"127.0.0.1:{await port}"
        stop.set()


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    exit_code: int
    stdout: str
    stderr: str


def run(words: list[str], stdin: bytes | None = None) -> Done:
    """Run a command here; with `stdin` as a process, which reads it from a pipe."""
    if stdin is None:
        done = CliRunner().invoke(app, words)
        return Done(done.exit_code, done.stdout, done.stderr)
    ended = subprocess.run(
        [Path(sys.executable).with_name("outbox"), *words],
        input=stdin,
        capture_output=True,
        check=False,
        timeout=60,
    )
    return Done(ended.returncode, ended.stdout.decode(), ended.stderr.decode())


async def outbox(scheduler: Scheduler, *words: str, stdin: bytes | None = None) -> Done:
    return await asyncio.to_thread(run, [*words, "--server", scheduler.address], stdin)


def write(name: str, content: str) -> None:
    Path(name).write_bytes(content.encode())


def read(name: str) -> str:
    return Path(name).read_bytes().decode()


async def schedule(
    scheduler: Scheduler, file: str, *words: str, stdin: bytes | None = None
) -> Done:
    sender = await scheduler.sender()
    content = ("--subject", "Hello", "--body", "Dear {{ first_name | default: 'you' }}")
    return await outbox(
        scheduler, "schedule", file, "--sender", sender.sender_id, *content, *words, stdin=stdin
    )


@pytest.mark.parametrize("piped", [False, True])
async def test_rejections_are_a_csv_that_can_be_mended_and_sent_again(
    scheduler: Scheduler, piped: bool
) -> None:
    write("people.csv", CSV)
    file, stdin = ("-", CSV.encode()) if piped else ("people.csv", None)
    done = await schedule(scheduler, file, "--rejections", "bad.csv", stdin=stdin)
    assert done.exit_code == 0, done.stderr
    assert "2 accepted, 3 rejected" in done.stderr
    bad = read("bad.csv")
    lines = bad.removeprefix("\ufeff").split("\r\n")
    assert bad.startswith("\ufeff")
    assert lines[0] == (
        "E-Mail;First Name;note;rejected_row;rejected_column;rejected_reason;rejected_message"
    )
    assert lines[1:3] == ['broken;Bob;"two', lines[2]]
    assert lines[2].startswith('lines";3;e_mail;ADDRESS_INVALID;')
    assert lines[3].startswith(";Dan;x;5;e_mail;EMAIL_MISSING;")
    assert lines[4].startswith("e@f.org;Eve;;6;;RAGGED_ROW;")
    mended = bad.replace("broken", "bob@b.org")
    write("mended.csv", mended)
    half = await schedule(scheduler, "mended.csv", "--rejections", "worse.csv")
    assert "2 accepted, 1 rejected" in half.stderr, half.stderr
    assert read("worse.csv").splitlines()[0] == bad.splitlines()[0]
    write("mended.csv", mended.replace("\r\n;Dan", "\r\ndan@b.org;Dan"))
    again = await schedule(scheduler, "mended.csv", "--rejections", "none.csv")
    assert "3 accepted, 0 rejected" in again.stderr, again.stderr
    with pytest.raises(FileNotFoundError):
        read("none.csv")


async def test_more_rejections_than_an_answer_holds_are_all_written(scheduler: Scheduler) -> None:
    rows = "".join("broken\n" if n % 2 else f"{n}@b.org\n" for n in range(3000))
    write("people.csv", f"email\n{rows}")
    done = await schedule(scheduler, "people.csv", "--rejections", "bad.csv", "-o", "json")
    assert done.exit_code == 0, done.stderr
    numbers = [line.split(",")[1] for line in read("bad.csv").splitlines()[1:]]
    assert numbers == [str(n) for n in range(2, 3001, 2)]


async def test_a_file_that_is_there_is_never_overwritten_and_nothing_is_sent(
    scheduler: Scheduler,
) -> None:
    write("people.csv", CSV)
    failed = await schedule(scheduler, "people.csv", "--rejections", "people.csv")
    assert failed.exit_code == 1
    assert "people.csv is there already" in failed.stderr
    assert read("people.csv") == CSV
    assert scheduler.value("SELECT count(*) FROM batches") == 0


async def test_a_dry_run_has_the_forecast_and_schedules_nothing(
    scheduler: Scheduler, stats: str
) -> None:
    sender = await scheduler.sender()
    write("people.csv", CSV)
    words = ["schedule", "people.csv", "--sender", sender.sender_id, "--subject", "Hello"]
    options = ["--body", "Hi", "--spacing", "1h", "--dry-run", "--server", stats]
    asked = await asyncio.to_thread(run, [*words, *options, "-o", "json"])
    assert asked.exit_code == 0, asked.stderr
    assert asked.stderr == (
        "5 rows read: 2 would be accepted, 3 rejected, 0 duplicate; suppressions were not looked"
        " at; nothing was scheduled\n"
    )
    found = json.loads(asked.stdout[asked.stdout.index("{\n") :])
    assert found["job_count"] == "2"
    distance = datetime.fromisoformat(found["end_time"]) - datetime.now(UTC)
    assert abs(distance - timedelta(hours=1)) < timedelta(minutes=1)
    assert scheduler.value("SELECT count(*) FROM batches") == 0


async def test_a_dry_run_tells_the_rows_apart_as_the_real_run_does(
    scheduler: Scheduler, stats: str
) -> None:
    sender = await scheduler.sender()
    later = (datetime.now(UTC) + timedelta(days=2)).isoformat(timespec="seconds")
    write("people.csv", f"email,send_at\na@b.org,\nbroken,\na@b.org,\nc@d.org,{later}\n")
    words = ["schedule", "people.csv", "--sender", sender.sender_id, "--subject", "Hello"]
    words += ["--body", "Hi"]
    dry = ["--dry-run", "--server", stats, "--rejections", "bad.csv"]
    tried = await asyncio.to_thread(run, [*words, *dry])
    assert tried.exit_code == 0, tried.stderr
    counts = ("2", "1", "1")
    assert "{} would be accepted, {} rejected, {} duplicate".format(*counts) in tried.stderr
    assert "1 rows have a send_at of their own" in tried.stderr
    assert "ADDRESS_INVALID" in tried.stdout
    real = await asyncio.to_thread(run, [*words, "--server", scheduler.address])
    assert "{} accepted, {} rejected, {} duplicate".format(*counts) in real.stderr
    assert read("bad.csv").splitlines()[1].startswith("broken,,2,email,ADDRESS_INVALID")


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (["--wait"], 2, "--wait follows a batch"),
        (["--mode", "strict"], 1, "its mode is STRICT; the first: row 3"),
        (["--body", "{{ order }"], 1, "body"),
        (["--body", "{{ unknown }}"], 1, "unknown"),
        (["--time-zone", "Mars/Olympus"], 1, "Mars/Olympus"),
    ],
)
async def test_a_dry_run_refuses_what_the_real_run_would(
    scheduler: Scheduler, stats: str, options: list[str], code: int, text: str
) -> None:
    sender = await scheduler.sender()
    write("people.csv", CSV)
    words = ["schedule", "people.csv", "--sender", sender.sender_id, "--subject", "Hello"]
    words += ["--body", "Hi", "--dry-run", "--server", stats, *options]
    refused = await asyncio.to_thread(run, words)
    assert refused.exit_code == code, refused.stderr
    assert text in " ".join(refused.stderr.split())


async def test_a_dry_run_refuses_what_can_be_no_batch(scheduler: Scheduler) -> None:
    write("people.csv", "name\nAnn\n")
    refused = await schedule(scheduler, "people.csv", "--dry-run")
    assert refused.exit_code == 1
    assert "no column `email`" in refused.stderr
    write("people.csv", CSV)
    # A scheduler has no forecasts, like a stats service of before.
    asked = await schedule(scheduler, "people.csv", "--dry-run")
    assert asked.exit_code == 1
    assert "no forecasts yet" in asked.stderr
    assert scheduler.value("SELECT count(*) FROM batches") == 0


async def test_all_pages_of_a_list_are_one_document(scheduler: Scheduler) -> None:
    rows = "".join(f"{n}@b.org\n" for n in range(5))
    write("people.csv", f"email\n{rows}")
    await schedule(scheduler, "people.csv")
    paged = await outbox(scheduler, "jobs", "list", "--user", "ann", "--page-size", "2")
    assert "there are more: --all" in paged.stderr
    words = ("jobs", "list", "--user", "ann", "--page-size", "2", "--all", "-o", "json")
    listed = await outbox(scheduler, *words)
    document = json.loads(listed.stdout[listed.stdout.index("{\n") :])
    assert [job["recipient"] for job in document["email_jobs"]] == [f"{n}@b.org" for n in range(5)]
    assert document["next_page_token"] == ""


def test_an_upload_without_an_answer_says_how_to_try_it_again() -> None:
    write("people.csv", "email\na@b.org\n")
    server = f"127.0.0.1:{free_port()}"
    words = ["schedule", "people.csv", "--sender", "1", "--request", "r1", "--server", server]
    failed = CliRunner().invoke(app, words)
    assert failed.exit_code == 1
    assert "no answer at" in failed.stderr
    assert "try again with --request r1" in failed.stderr


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("outbox sche", "schedule"),
        ("outbox senders pa", "pause"),
        ("outbox jobs list --st", "--state"),
    ],
)
def test_the_shell_completes_commands_and_options(typed: str, offered: str) -> None:
    words = typed.split()
    variables = {
        "_OUTBOX_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(words) - 1),
    }
    done = CliRunner().invoke(app, [], env=variables, prog_name="outbox")
    assert offered in done.stdout.split()
