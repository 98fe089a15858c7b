"""The commands that call a scheduler, against a real one."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from outbox_server.cli.main import app
from outbox_server.deploy.ports import free_port
from outbox_server.shared.rpc import server_info
from tests import cooldowns
from tests.commands import CommandResult, outbox, run, run_process
from tests.eventually import PATIENCE
from tests.for_each import for_each_case
from tests.scheduler_stack import Scheduler, running_scheduler
from tests.stats_stack import running_stats

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
    async with running_stats(scheduler.settings) as address:
        yield address


def write(name: str, content: str) -> None:
    Path(name).write_bytes(content.encode())


def read(name: str) -> str:
    return Path(name).read_bytes().decode()


async def schedule(scheduler: Scheduler, file: str, *words: str, piped: str = "") -> CommandResult:
    """Run `outbox schedule`; with `piped`, as a process that gets it through a pipe."""
    sender = await scheduler.sender()
    content = ("--subject", "Hello", "--body", "Dear {{ first_name | default: 'you' }}")
    words = ("schedule", file, "--sender", sender.sender_id, *content, *words)
    if not piped:
        return await outbox(scheduler, *words)
    server = ("--server", scheduler.address)
    return await asyncio.to_thread(run_process, [*words, *server], piped.encode())


@pytest.mark.parametrize("piped", [False, True])
async def test_rejections_are_a_csv_that_can_be_fixed_and_sent_again(
    scheduler: Scheduler, piped: bool
) -> None:
    write("people.csv", CSV)
    file, content = ("-", CSV) if piped else ("people.csv", "")
    done = await schedule(scheduler, file, "--rejections", "bad.csv", piped=content)
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
    fixed = bad.replace("broken", "bob@b.org")
    write("fixed.csv", fixed)
    half = await schedule(scheduler, "fixed.csv", "--rejections", "worse.csv")
    assert "2 accepted, 1 rejected" in half.stderr, half.stderr
    assert read("worse.csv").splitlines()[0] == bad.splitlines()[0]
    write("fixed.csv", fixed.replace("\r\n;Dan", "\r\ndan@b.org;Dan"))
    again = await schedule(scheduler, "fixed.csv", "--rejections", "none.csv")
    assert "3 accepted, 0 rejected" in again.stderr, again.stderr
    with pytest.raises(FileNotFoundError):
        read("none.csv")


async def test_headers_ids_and_labels_are_options(scheduler: Scheduler) -> None:
    write("people.csv", "email,Name,no,region\na@b.org,Ann,7,north\n")
    done = await schedule(
        scheduler,
        "people.csv",
        *("--reply-to", "Shop <shop@b.org>", "--name-column", "Name"),
        *("--header", "List-Unsubscribe: <https://b.org/{{ no }}>"),
        *("--header", "List-Unsubscribe-Post: List-Unsubscribe=One-Click"),
        *("--external-id", "spring", "--label", "campaign=a=b", "--label", "kind=news"),
        *("--external-id-column", "no", "--label-column", "region", "-o", "json"),
    )
    assert done.exit_code == 0, done.stderr
    batch = json.loads(done.stdout)["batch"]
    assert [each["value"] for each in batch["headers"]] == [
        "<https://b.org/{{ no }}>",
        "List-Unsubscribe=One-Click",
    ]
    assert batch["labels"] == {"campaign": "a=b", "kind": "news"}
    wanted = "external_id = 7 AND labels.region = north AND labels.campaign = 'a=b'"
    listed = await outbox(
        scheduler, "jobs", "list", "--user", "ann", "--filter", wanted, "-o", "json"
    )
    [job] = json.loads(listed.stdout)["email_jobs"]
    assert (job["recipient"], job["external_id"]) == ("a@b.org", "7")

    for words, said in (
        (("--header", "Bcc: eve@b.org"), "--header: 'Bcc' is not allowed"),
        (("--header", "X-A: {{ x"), "--header: line 1"),
        (("--label", "Kind=x"), "--label: the key"),
        (("--label-column", "x"), "--label-column: the CSV has no column"),
        (("--reply-to", "x"), "--reply-to: Reply-To must be"),
    ):
        refused = await schedule(scheduler, "people.csv", *words)
        assert refused.exit_code == 1, words
        assert said in refused.stderr
    for wrong in (["--header", "no colon"], ["--label", "x"], ["--label", "a=1", "--label", "a=2"]):
        assert (await schedule(scheduler, "people.csv", *wrong)).exit_code == 2


async def test_rejections_beyond_one_response_are_all_written(scheduler: Scheduler) -> None:
    rows = "".join("broken\n" if n % 2 else f"{n}@b.org\n" for n in range(3000))
    write("people.csv", f"email\n{rows}")
    done = await schedule(scheduler, "people.csv", "--rejections", "bad.csv", "-o", "json")
    assert done.exit_code == 0, done.stderr
    numbers = [line.split(",")[1] for line in read("bad.csv").splitlines()[1:]]
    assert numbers == [str(n) for n in range(2, 3001, 2)]


async def test_an_existing_file_is_never_overwritten_and_nothing_is_sent(
    scheduler: Scheduler,
) -> None:
    write("people.csv", CSV)
    failed = await schedule(scheduler, "people.csv", "--rejections", "people.csv")
    assert failed.exit_code == 1
    assert "people.csv exists already" in failed.stderr
    assert read("people.csv") == CSV
    assert scheduler.value("SELECT count(*) FROM batches") == 0


async def test_a_dry_run_answers_like_the_real_run_and_schedules_nothing(
    scheduler: Scheduler,
) -> None:
    write("people.csv", CSV)
    sender = (await scheduler.sender()).sender_id
    content = ("--subject", "Hello", "--body", "Hi", "--spacing", "1h")
    words = ("schedule", "people.csv", "--sender", sender, *content)
    asked = await outbox(scheduler, *words, "--dry-run", "-o", "json")
    assert asked.exit_code == 0, asked.stderr
    assert asked.stderr == (
        "5 rows read: 2 would be accepted, 3 rejected, 0 duplicate, 0 suppressed;"
        " nothing was scheduled\n"
    )
    found = json.loads(asked.stdout)
    assert found["batch"]["accepted_count"] == "2"
    assert len(found["rejections"]) == 3
    distance = datetime.fromisoformat(found["forecast_end_time"]) - datetime.now(UTC)
    assert abs(distance - timedelta(hours=1)) < timedelta(minutes=1)
    assert scheduler.value("SELECT count(*) FROM batches") == 0
    shown = await outbox(scheduler, *words, "--dry-run", "--rejections", "bad.csv")
    assert "the last mail is forecast for" in shown.stderr
    assert "batch_id" not in shown.stdout
    assert "ADDRESS_INVALID" in shown.stdout
    assert read("bad.csv").count("e_mail;") == 2


@for_each_case(
    "options code text",
    [
        (["--wait"], 2, "--wait follows a batch"),
        (["--mode", "strict"], 1, "the mode is STRICT; the first: row 3"),
        (["--body", "{{ order }"], 1, "body"),
        (["--body", "{{ unknown }}"], 1, "unknown"),
        (["--time-zone", "Mars/Olympus"], 1, "Mars/Olympus"),
    ],
)
async def test_a_dry_run_refuses_the_same_input_as_the_real_run(
    scheduler: Scheduler, options: list[str], code: int, text: str
) -> None:
    write("people.csv", CSV)
    refused = await schedule(scheduler, "people.csv", "--body", "Hi", "--dry-run", *options)
    assert refused.exit_code == code, refused.stderr
    assert text in " ".join(refused.stderr.split())
    assert scheduler.value("SELECT count(*) FROM batches") == 0


async def test_a_dry_run_is_never_sent_to_a_scheduler_that_would_store_it(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("people.csv", CSV)
    older = tuple(each for each in server_info.CAPABILITIES if each != "change.validate_only")
    monkeypatch.setattr(server_info, "CAPABILITIES", older)
    refused = await schedule(scheduler, "people.csv", "--dry-run")
    assert refused.exit_code == 1
    assert "too old for --dry-run" in refused.stderr
    assert scheduler.value("SELECT count(*) FROM batches") == 0


async def test_all_pages_of_a_list_are_one_document(scheduler: Scheduler) -> None:
    rows = "".join(f"{n}@b.org\n" for n in range(5))
    write("people.csv", f"email\n{rows}")
    await schedule(scheduler, "people.csv")
    paged = await outbox(scheduler, "jobs", "list", "--user", "ann", "--page-size", "2")
    assert "more results: use --all" in paged.stderr
    words = ("jobs", "list", "--user", "ann", "--page-size", "2", "--all", "-o", "json")
    listed = await outbox(scheduler, *words)
    document = json.loads(listed.stdout)
    assert [job["recipient"] for job in document["email_jobs"]] == [f"{n}@b.org" for n in range(5)]
    assert document["next_page_token"] == ""


# Sets a window title, clears the screen, colours by a C1 control, reverses the writing direction.
STEERING = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e"


async def test_a_cooldown_is_shown_everywhere_without_terminal_escapes(
    scheduler: Scheduler, stats: str
) -> None:
    sender, well = await scheduler.sender(), await scheduler.sender()
    batch = (await scheduler.schedule(sender)).batch
    job = str(scheduler.value("SELECT id FROM email_jobs"))
    message = f"Daily limit{STEERING}"
    cooldowns.begin(scheduler.execute, sender.sender_id, message=message)
    scheduler.execute(
        "INSERT INTO attempts (email_job_id, attempt, sender_id, started_at, ended_at, outcome,"
        " counted, smtp_code, enhanced_code, message, reply_class)"
        " SELECT id, 1, sender_id, now(), now(), 3, false, 550, '5.4.5', %s, 3 FROM email_jobs",
        message,
    )
    shown = "550 5.4.5 Daily limit\\x1b]0;owned\\x07\\x1b[2J\\x9b31m\\u202e"
    of_sender, user = ("--user", "ann"), sender.sender_id
    write("people.csv", "email\na@b.org\n")
    planned = ("people.csv", "--sender", user, "--subject", "Hello", "--body", "Hi", "--dry-run")
    in_table = f": {shown}; next probe 2"
    in_sentence = f"({shown}); the next probe is at"
    for words, server, text in (
        (("senders", "get", user), scheduler.address, in_table),
        (("senders", "list", *of_sender), scheduler.address, in_table),
        (("jobs", "explain", job), scheduler.address, in_sentence),
        (("jobs", "attempts", job), scheduler.address, " ACCOUNT "),
        (("jobs", "get", job), scheduler.address, shown.removeprefix("550 5.4.5 ")),
        (("stats", "sender", user), stats, in_table),
        (("stats", "forecast", batch.batch_id), stats, in_sentence),
        (("stats", "forecast", "--sender", user, "--recipient-count", "5"), stats, in_sentence),
        (("schedule", *planned), scheduler.address, in_sentence),
    ):
        for output in ("table", "json"):
            done = await asyncio.to_thread(run, [*words, "-o", output, "--server", server])
            assert done.exit_code == 0, done.stderr
            printed = done.stdout + done.stderr
            assert all(char.isprintable() or char == "\n" for char in printed), words
            assert output == "json" or text in printed, words
    done = await outbox(scheduler, "senders", "get", user, "-o", "json")
    document = json.loads(done.stdout)
    assert document["cooldown"]["message"] == message
    done = await outbox(scheduler, "senders", "resume", user)
    assert done.exit_code == 0
    listed = await outbox(scheduler, "senders", "list", *of_sender)
    assert "cooldown" not in listed.stdout
    assert well.sender_id in listed.stdout


async def test_a_watch_prints_the_cooldown_beside_the_counts(
    scheduler: Scheduler, stats: str
) -> None:
    sender = await scheduler.sender()
    watch = await asyncio.create_subprocess_exec(
        Path(sys.executable).with_name("outbox"),
        *("stats", "watch", sender.sender_id, "--server", stats),
        stdout=asyncio.subprocess.PIPE,
    )
    assert watch.stdout is not None
    try:
        async with asyncio.timeout(PATIENCE):
            assert b"cooldown" not in await watch.stdout.readline()
            cooldowns.begin(scheduler.execute, sender.sender_id)
            assert f": {cooldowns.REPLY}; next probe 2".encode() in await watch.stdout.readline()
    finally:
        watch.kill()
        await watch.wait()


def test_an_upload_without_an_answer_says_how_to_retry_it() -> None:
    write("people.csv", "email\na@b.org\n")
    server = f"127.0.0.1:{free_port()}"
    words = ["schedule", "people.csv", "--sender", "1", "--request", "r1", "--server", server]
    failed = CliRunner().invoke(app, words)
    assert failed.exit_code == 1
    assert "nothing listens at" in failed.stderr
    assert "try again with --request-id r1" in failed.stderr


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
