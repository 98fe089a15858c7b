"""Options that all commands share, against a real scheduler: their place, changes, JSON errors."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from outbox_server.shared.database.schema import REVISION
from tests.commands import CommandResult, run
from tests.scheduler_stack import Scheduler


async def outbox(*words: str) -> CommandResult:
    # As a process: the scheduler of this one logs to the same stdout.
    return await asyncio.to_thread(run, list(words))


def error_of(failed: CommandResult, exit_code: int = 1) -> Any:
    """Return the error document, which is the last line on stderr."""
    assert (failed.exit_code, failed.stdout) == (exit_code, ""), failed
    return json.loads(failed.stderr.splitlines()[-1])["error"]


async def test_options_may_stand_before_between_and_after_the_command(
    scheduler: Scheduler,
) -> None:
    sender = await scheduler.sender("ann")
    at = ("--server", scheduler.address)
    for words in (
        ("--user", "ann", *at, "-o", "json", "senders", "list"),
        ("senders", "--user=ann", *at, "-ojson", "list"),
        ("senders", "list", "--user", "ann", *at, "--output", "json"),
        ("--user", "bob", *at, "senders", "-o", "json", "list", "--user", "ann"),
        ("--timeout", "9s", "--user", "ann", *at, "-o", "json", "senders", "list"),
    ):
        done = await outbox(*words)
        assert done.exit_code == 0, (words, done)
        assert [each["sender_id"] for each in json.loads(done.stdout)["senders"]] == [
            sender.sender_id
        ]


async def test_a_change_is_made_once_and_its_audit_event_says_who_and_why(
    scheduler: Scheduler, tmp_path: Path
) -> None:
    end = ("--user", "ann", "--server", scheduler.address, "-o", "json")
    said = ("--request-id", "r-1", "--identity", "ann of support", "--reason", "ticket 5")
    create = ("senders", "create", "--email", "a@b.org", *said, *end)
    first, second = await outbox(*create), await outbox(*create)
    made = json.loads(first.stdout)
    assert json.loads(second.stdout)["sender_id"] == made["sender_id"]

    reused = error_of(await outbox("senders", "create", "--email", "c@d.org", *said, *end))
    assert (reused["code"], reused["reason"]) == ("ALREADY_EXISTS", "REQUEST_ID_REUSED")
    assert reused["metadata"]["request_id"] == "r-1"

    stale = ("senders", "pause", made["sender_id"], "--etag", "old", *end)
    assert error_of(await outbox(*stale))["reason"] == "ETAG_MISMATCH"
    update = ("senders", "update", made["sender_id"], "--hourly-limit", "5", "--etag", "old", *end)
    assert error_of(await outbox(*update))["reason"] == "ETAG_MISMATCH"
    paused = ("senders", "pause", made["sender_id"], "--etag", made["etag"], *end)
    assert (await outbox(*paused)).exit_code == 0

    # Here, --reason belongs to the suppression.
    address = ("suppressions", "create", "x@y.org", "--reason", "bounced")
    await outbox(*address, "--change-reason", "clean-up", *end)
    who = ("--identity", "bob", "--reason", "the news")
    mail = ("--subject", "Hi", "--body", "Hello")
    people = tmp_path / "people.csv"
    people.write_text("email\nann@b.org\n", encoding="utf-8")
    sender = made["sender_id"]
    await outbox("schedule", str(people), "--sender", sender, *mail, *who, *end)
    await outbox("senders", "test", sender, "--recipient", "me@b.org", *mail, *who, *end)
    listed = await outbox("audit-events", *end)
    events = json.loads(listed.stdout)["audit_events"]
    assert [(each["action"], each["identity"], each["reason"]) for each in reversed(events)] == [
        ("CreateSender", "ann of support", "ticket 5"),
        ("PauseSender", "", ""),
        ("CreateSuppression", "", "clean-up"),
        ("UploadBatch", "bob", "the news"),
        ("SendTestEmail", "bob", "the news"),
    ]


async def test_a_set_of_jobs_is_changed_once_in_all_its_parts(scheduler: Scheduler) -> None:
    sender = await scheduler.sender("ann")
    await scheduler.schedule(sender, "email\na@b.org\nc@d.org\ne@f.org\n")
    end = ("--user", "ann", "--server", scheduler.address, "-o", "json")
    cancel = ("jobs", "cancel", "--filter", f"sender_id = {sender.sender_id}", *end)
    for _ in range(2):
        done = await outbox(*cancel, "--request-id", "r-2")
        assert json.loads(done.stdout)["cancelled_count"] == "3", done
    assert json.loads((await outbox(*cancel)).stdout)["cancelled_count"] == "0"


async def test_errors_are_json_on_stderr_if_the_output_is(scheduler: Scheduler) -> None:
    at = ("--server", scheduler.address)
    wrong = error_of(
        await outbox("-o", "json", "senders", "create", "--user", "ann", "--email", "x",
                     "--hourly-limit", "-5", *at)
    )  # fmt: skip
    assert (wrong["code"], wrong["reason"]) == ("INVALID_ARGUMENT", "ADDRESS_INVALID")
    # The fields are those of the request, for programs; the texts name the flags, for people.
    assert [each["field"] for each in wrong["violations"]] == [
        "sender.email",
        "sender.hourly_limit",
    ]

    absent = error_of(await outbox("senders", "get", "1", *at, "-o", "json"))
    assert (absent["reason"], absent["metadata"]) == ("SENDER_NOT_FOUND", {"sender_id": "1"})

    usage = error_of(await outbox("senders", "list", "--bogus", "-o", "json"), exit_code=2)
    assert usage["reason"] == "USAGE_ERROR"
    assert "--bogus" in usage["message"]
    usage = error_of(await outbox("jobs", "list", "--page-size", "x", "-o", "json"), exit_code=2)
    assert "Input should" not in usage["message"]
    usage = error_of(await outbox("drill", "--stores", "x", "-o", "json"), exit_code=2)
    one_of = "'x' is not one of 'single', 'cluster'."
    assert usage["message"] == f"Invalid value for '--stores': {one_of}"
    usage = error_of(await outbox("held", "release", "-o", "json"), exit_code=2)
    assert "--batch" in usage["message"]
    usage = error_of(await outbox("--user", "u", "-o", "json", "migrate"), exit_code=2)
    assert "no such option" in usage["message"]

    away = error_of(await outbox("senders", "list", "--server", "127.0.0.1:1", "-o", "json"))
    assert (away["code"], away["reason"]) == ("UNAVAILABLE", "")
    assert "nothing listens" in away["message"]


async def test_migrate_prints_the_revisions_as_json(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTBOX_DATABASE_URL", scheduler.settings.database_url)
    document = json.loads((await outbox("-o", "json", "migrate")).stdout)
    assert document["revision"] == document["revision_before"] == REVISION
    assert document["changed"] is False
