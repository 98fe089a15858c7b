"""`outbox up` and `outbox demo` as processes, with real kills."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from outbox.v1.batch_pb2 import BatchOptions, Recipient, Recipients
from outbox.v1.batch_service_pb2 import ScheduleBatchRequest
from outbox.v1.batch_service_pb2_grpc import BatchServiceStub
from outbox.v1.sender_pb2 import Sender
from outbox.v1.sender_service_pb2 import CreateSenderRequest
from outbox.v1.sender_service_pb2_grpc import SenderServiceStub

from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.deploy.record import ReceivedMail, least_gap_s, read_record
from tests.commands import CommandResult, run
from tests.eventually import PATIENCE, eventually
from tests.processes import alive, descendants, pid_of

OUTBOX = Path(sys.executable).with_name("outbox")
GAP_S = 0.2


def environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OUTBOX_")}
    return kept | {"OUTBOX_MIN_GAP": "200ms"} | variables


@dataclass
class RunningUp:
    """A running `outbox up`."""

    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def endpoints(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / ".outbox/endpoints.json").read_text())
        return found

    @property
    def errors(self) -> str:
        return (self.folder / "stderr").read_text()

    def mails(self) -> list[ReceivedMail]:
        return read_record(self.folder / ".outbox/inbox/record.jsonl")

    def outbox(self, *words: str) -> CommandResult:
        """Run a command in the stack's folder, but in this process, as Python starts slowly.

        It runs in a thread, because some commands run an event loop.
        """
        with chdir(self.folder), ThreadPoolExecutor(1) as thread:
            return thread.submit(run, list(words)).result()

    def ask(self, *words: str) -> dict[str, Any]:
        answer = self.outbox(*words, "-o", "json")
        assert answer.exit_code == 0, answer.stderr
        document: dict[str, Any] = json.loads(answer.stdout)
        return document


@contextmanager
def new_folder() -> Iterator[Path]:
    # Not pytest's own folder: only its owner may enter it, and PostgreSQL refuses to run as root.
    path = Path(tempfile.mkdtemp(prefix="outbox-up-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def folder() -> Iterator[Path]:
    with new_folder() as path:
        yield path


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def up() -> AsyncIterator[RunningUp]:
    """`outbox up` for several tests: none of them stops it, and each has its own user."""
    with new_folder() as path:
        async with running(path) as one:
            yield one


@asynccontextmanager
async def running(folder: Path, *options: str, **variables: str) -> AsyncIterator[RunningUp]:
    """Run `outbox up` in a folder; kill it at the end of the block if it still runs."""
    with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
        process = subprocess.Popen(  # noqa: ASYNC220 - returns at once
            [OUTBOX, "up", *options],
            cwd=folder,
            env=environment(**variables),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
        )
    up = RunningUp(process, folder)
    started: set[int] = set()
    try:
        await eventually(lambda: is_ready(up))
        started = descendants(process.pid)
        yield up
    except AssertionError:
        for log in sorted((folder / ".outbox/logs").glob("*")):
            sys.stderr.write(f"{log.name}:\n{log.read_text()[-4_000:]}\n")
        raise
    finally:
        if process.poll() is None:
            started |= descendants(process.pid)
            process.kill()
            process.wait()
        await eventually(lambda: not any(map(alive, started)))


def is_ready(up: RunningUp) -> bool:
    assert up.process.poll() is None, up.errors
    return "ready after" in up.errors


async def ended(process: subprocess.Popen[bytes]) -> int:
    await eventually(lambda: process.poll() is not None)
    return process.wait()


def schedule(
    up: RunningUp, request_id: str, sender_id: str | None, names: list[str], *, user: str = "u"
) -> str:
    """Schedule a mail to each of `names`, over gRPC; return the sender's id."""
    with grpc.insecure_channel(up.endpoints["scheduler"]) as channel:
        if sender_id is None:
            sender = Sender(email="news@example.com")
            sender_id = (
                SenderServiceStub(channel)
                .CreateSender(CreateSenderRequest(user_id=user, sender=sender), timeout=PATIENCE)
                .sender_id
            )
        rows = [Recipient(email=f"{name}@example.org", columns={"name": name}) for name in names]
        options = BatchOptions(
            request_id=request_id, sender_id=sender_id, subject="Hello {{ name }}", body="Hi"
        )
        answer = BatchServiceStub(channel).ScheduleBatch(
            ScheduleBatchRequest(options=options, recipients=Recipients(rows=rows)),
            timeout=PATIENCE,
        )
        assert answer.batch.accepted_count == len(names)
    return sender_id


async def test_mail_scheduled_before_a_kill_of_everything_arrives_after_the_next_start(
    folder: Path,
) -> None:
    names = [f"r{number}" for number in range(12)]
    # A mail whose send was cut off is sent again once its lease has expired.
    async with running(folder, OUTBOX_LEASE="2s") as up:
        sender_id = schedule(up, "first", None, names)
        await eventually(lambda: len(up.mails()) >= 3)
        everything = descendants(up.process.pid)
        assert len(everything) >= 5  # PostgreSQL, Valkey and three services
        up.process.kill()
        up.process.wait()
        await eventually(lambda: not any(map(alive, everything)))
        assert len(up.mails()) < len(names)

    async with running(folder, OUTBOX_LEASE="2s") as up:
        assert up.ask("senders", "list", "--user", "u")["senders"][0]["sender_id"] == sender_id
        schedule(up, "second", sender_id, ["late"])
        wanted = {f"{name}@example.org" for name in (*names, "late")}
        await eventually(lambda: {mail.rcpt_tos[0] for mail in up.mails()} == wanted)
        # With a gap, one mail at a time is in flight, so at most one was in doubt at the kill.
        assert len(up.mails()) <= len(wanted) + 1
        gap = least_gap_s(up.mails())
        assert gap is not None
        assert gap >= GAP_S
        everything = descendants(up.process.pid)
        up.process.send_signal(signal.SIGTERM)
        assert await ended(up.process) == 0
        assert not any(map(alive, everything))
        assert not (folder / ".outbox/endpoints.json").exists()


@pytest.mark.parametrize("service", ["dispatcher", "scheduler", "stats"])
async def test_a_service_that_is_killed_is_started_again_at_its_address(
    up: RunningUp, service: str
) -> None:
    module = f"outbox_server.services.{service}"
    before = pid_of(module, descendants(up.process.pid))
    os.kill(before, signal.SIGKILL)
    await eventually(lambda: f"{service} is running again" in up.errors)
    assert f"{service} was ended by SIGKILL; starting it again" in up.errors
    assert pid_of(module, descendants(up.process.pid)) != before
    schedule(up, "first", None, [service], user=service)
    recipient = f"{service}@example.org"
    await eventually(lambda: recipient in [mail.rcpt_tos[0] for mail in up.mails()])
    assert up.ask("stats", "user", service)["user_id"] == service


def test_a_second_up_in_the_same_folder_names_the_process_that_holds_it(up: RunningUp) -> None:
    second = subprocess.run(
        [OUTBOX, "up"],
        cwd=up.folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert second.returncode == 1
    assert f"in use by process {up.process.pid}" in second.stderr
    answer = up.ask("senders", "list", "--user", "nobody")
    assert answer == {"senders": [], "next_page_token": ""}


def pasted(folder: Path, lines: list[str]) -> str:
    """Run lines in one shell and return their output; each line must succeed."""
    shell = subprocess.run(
        ["bash", "-euo", "pipefail"],
        input="\n".join(lines),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert shell.returncode == 0, f"{shell.stdout[-1500:]}{shell.stderr}"
    return shell.stdout


async def test_mail_to_a_relay_is_held_until_it_is_released_and_the_audit_asks_postgresql(
    folder: Path,
) -> None:
    names = ["ann", "ben", "cy"]

    async def all_sent(up: RunningUp, count: int) -> bool:
        found = await asyncio.to_thread(up.ask, "stats", "user", "u")
        return bool(found["counts"].get("sent_count") == str(count))

    # The other server runs in this process, so every wait here must let it run.
    async with Inbox(folder / "other") as other:
        # This folder sent all mail to a relay, and is now started without one.
        # In a file, because it has a password.
        login = other.url.replace("//", "//relay-user:relay-s3cret@")
        (folder / "relay").write_text(f"{login}\n")
        async with running(folder, "--hold", "--smtp-file", "relay") as up:
            assert "all mail goes to smtp://relay-user:***@" in (folder / "stdout").read_text()
            assert up.endpoints["inbox"] is None
            await asyncio.to_thread(schedule, up, "relayed", None, names)
            shown = await asyncio.to_thread(up.ask, "held")
            assert (shown["reason"], shown["job_count"]) == ("HOLD_REASON_REQUESTED", "3")
            table = (await asyncio.to_thread(up.outbox, "held")).stdout
            assert "DUE" in table
            assert "news@example.com" in table
            assert not other.mails
            released = await asyncio.to_thread(up.ask, "held", "release", "--all")
            assert released == {"released_count": "3", "hold_ended": True}
            await eventually(lambda: len(other.mails) == 3)
            assert not up.mails()
            assert "not held" in (await asyncio.to_thread(up.outbox, "held")).stderr
            await eventually(lambda: all_sent(up, 3))
            assert (await asyncio.to_thread(up.ask, "audit"))["broken"] == []
        async with running(folder) as up:
            host, port = other.url.removeprefix("smtp://").split(":")
            own_server = await asyncio.to_thread(
                up.ask,
                *("senders", "create", "--user", "u", "--email", "own@example.com"),
                *("--smtp-host", host, "--smtp-port", port, "--smtp-security", "none"),
            )
            await asyncio.to_thread(schedule, up, "own", own_server["sender_id"], names)
            await asyncio.to_thread(schedule, up, "inbox", None, names)
            await eventually(lambda: (len(up.mails()), len(other.mails)) == (3, 6))
            await eventually(lambda: all_sent(up, 9))
            found = await asyncio.to_thread(up.ask, "audit")
    assert (found["broken"], found["lost"]) == ([], 0)
    assert (found["sent"], found["seen"], found["sent_elsewhere"]) == (9, 3, 6)
    checked_by = sorted(one["checked_by"] for one in found["senders"])
    assert checked_by == ["postgresql", "postgresql", "smtp side"]


async def test_a_simulated_provider_keeps_its_rules_and_the_printed_commands_reach_its_quota(
    folder: Path,
) -> None:
    options = ("--provider", "gmail", "--provider-quota", "20", "--provider-scale", "0.002")
    async with running(folder, *options) as up:
        assert up.endpoints["provider"] == "gmail"
        # This includes TLS and the account's login.
        assert up.endpoints["smtp_url"].startswith("smtp+starttls://outbox:outbox@127.0.0.1:")
        printed = (folder / "stdout").read_text()
        assert "a Gmail account (smtp.gmail.com), simulated" in printed
        assert "20 mails of an account in any 172.8s, then: 550 5.4.5 Daily user" in printed
        # The sender's own relay is overridden: the audit checks only the provider.
        sender = up.ask(
            *("senders", "create", "--user", "u", "--email", "news@example.com"),
            *("--smtp-host", "127.0.0.1", "--smtp-port", "9", "--smtp-security", "none"),
        )
        schedule(up, "first", sender["sender_id"], ["ann", "ben", "unknown"])
        await eventually(lambda: len(up.mails()) == 2)
        await eventually(lambda: up.ask("stats", "user", "u")["counts"]["failed_count"] == "1")
        found = up.ask("audit")
        assert (found["broken"], found["seen"], found["checked_by"]) == ([], 2, "smtp side")
        assert found["sent_elsewhere"] == 0

        lines = re.findall(r"(?m)^  (\S.*)", printed)
        assert len(lines) == 7
        assert "person30@example.org" in pasted(folder, lines)
        (one,) = up.ask("senders", "list", "--user", "acme")["senders"]
        await eventually(
            lambda: "5.4.5" in str(up.ask("senders", "get", one["sender_id"]).get("cooldown"))
        )
        assert len(up.mails()) == 20
        up.process.send_signal(signal.SIGTERM)
        assert await ended(up.process) == 0
        assert "the provider accepted 20 mails (0 of them copies) on" in up.errors
        assert "1 x 550 5.1.1 The email account that you" in up.errors


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--provider", "hotmail"), "there is no provider 'hotmail'"),
        (("--provider", "gmail", "--smtp", "smtp://127.0.0.1:25"), "exclude each other"),
        (("--provider-quota", "5"), "--provider-quota needs --provider"),
        (("--provider-scale", "0.5"), "--provider-scale needs --provider"),
    ],
)
def test_wrong_options_of_a_provider_are_refused_before_anything_starts(
    folder: Path, words: tuple[str, ...], complaint: str
) -> None:
    with chdir(folder):
        refused = run(["up", *words])
    assert refused.exit_code == 2
    assert complaint in " ".join(refused.stderr.replace("│", " ").split())
    assert not (folder / ".outbox").exists()


def test_the_client_commands_work_with_a_running_stack(up: RunningUp) -> None:
    sender = up.ask(
        *("senders", "create", "--user", "u", "--email", "news@example.com"),
        *("--hourly-limit", "5000", "--min-gap", "1s"),
    )
    assert (sender["min_gap"], sender["hourly_limit"]) == ("1s", 5000)
    sender_id = sender["sender_id"]
    changed = up.ask("senders", "update", sender_id, "--unset", "min_gap")
    assert changed["effective_min_gap"] == "0.200s"
    assert up.ask("senders", "pause", sender_id)["state"] == "SENDER_STATE_PAUSED"
    up.ask("suppressions", "create", "cy@example.org", "--user", "u", "--reason", "asked")

    (up.folder / "people.csv").write_text(
        "email,First Name\nann@example.org,Ann\nben@example.org,Ben\nnobody,N\n"
        "cy@example.org,Cy\nANN@example.org,Ann\n"
    )
    upload = ("schedule", "people.csv", "--sender", sender_id, "--body", "Hi")
    answer = up.ask(*upload, "--subject", "Hello {{ first_name }}", "--request", "r1")
    batch = answer["batch"]
    counts = ("accepted_count", "rejected_count", "duplicate_count", "suppressed_count")
    assert [batch[name] for name in counts] == ["2", "1", "1", "1"]
    batch_id = batch["batch_id"]
    assert up.ask("batches", "rejections", batch_id)["rejections"][0]["row_number"] == "3"
    waiting = up.ask("jobs", "list", "--batch", batch_id, "--state", "scheduled")
    job_id = waiting["email_jobs"][1]["email_job_id"]
    assert up.ask("jobs", "cancel", job_id)["state"] == "EMAIL_JOB_STATE_CANCELLED"
    assert up.ask("senders", "resume", sender_id)["state"] == "SENDER_STATE_ACTIVE"

    again = up.outbox(*upload, "--subject", "Other", "--request", "r1")
    assert again.exit_code == 1
    assert again.stderr.startswith("outbox: ")
    assert "REQUEST_ID_REUSED" in again.stderr
    followed = up.ask(*upload, "--subject", "Hello {{ first_name }}", "--request", "r1", "--wait")
    assert followed["replayed"]
    assert followed["batch"]["counts"]["sent_count"] == "1"
    assert followed["batch"]["body"] == "Hi"
    assert up.ask("stats", "sender", sender_id)["counts"]["cancelled_count"] == "1"
    sent_id = waiting["email_jobs"][0]["email_job_id"]
    assert up.ask("jobs", "attempts", sent_id)["attempts"][0]["smtp_code"] == 250
    late = up.outbox("jobs", "cancel", sent_id)
    assert (late.exit_code, "TOO_LATE_TO_CANCEL" in late.stderr) == (1, True)
    assert up.ask("batches", "cancel", batch_id)["too_late_count"] == "1"
    assert up.ask("suppressions", "list", "--user", "u")["suppressions"][0]["reason"] == "asked"
    assert up.ask("suppressions", "delete", "cy@example.org", "--user", "u") == {}
    found = up.ask("audit")
    seen = len(up.mails())
    assert (found["broken"], found["seen"], found["checked_by"]) == ([], seen, "smtp side")
    assert found["sent_elsewhere"] == 0
    assert found["compared_with"]["min_gap"] == "200ms"
    bad = up.outbox("senders", "create", "--user", "u", "--email", "x@y.de", "--min-gap", "1ms")
    assert (bad.exit_code, "GAP_BELOW_FLOOR" in bad.stderr) == (1, True)
    assert bad.stderr.count("\n") == 1
    table = up.outbox("senders", "list", "--user", "u").stdout
    assert "news@example.com" in table
    assert up.ask("senders", "delete", sender_id) == {}
    assert up.ask("dispatcher", "status")["state"] == "DISPATCHER_STATE_SERVING"


def test_the_demo_checks_the_promises_and_leaves_nothing_but_mails() -> None:
    demo = subprocess.run(
        [OUTBOX, "demo", "-o", "json"],
        env=environment(OUTBOX_MIN_GAP="100ms", OUTBOX_RATE_WINDOW="2s"),
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert demo.returncode == 0, demo.stderr
    document = json.loads(demo.stdout)
    inbox = Path(document["inbox"])
    try:
        assert {name: document[name] for name in ("accepted", "rejected", "sent", "failed")} == {
            "accepted": 48,
            "rejected": 4,
            "sent": 48,
            "failed": 0,
        }
        assert (document["lost"], document["duplicates"], document["broken"]) == (0, 0, [])
        assert document["least_gap_s"] >= 0.1
        assert document["senders"][1]["most_in_window"] <= document["senders"][1]["hourly_limit"]
        assert len(list((inbox / "new").iterdir())) == 48
        assert [path.name for path in inbox.parent.iterdir()] == ["inbox"]
    finally:
        shutil.rmtree(inbox.parent)
