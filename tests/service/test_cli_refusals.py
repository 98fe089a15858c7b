"""Every client command fails with an exit code and, with `-o json`, a JSON error on stderr."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.command_tree import ALL, NOT_CLIENTS, flags
from tests.commands import run
from tests.scheduler_stack import Scheduler, running_scheduler

CLIENTS = {
    path: found for path, found in ALL if "--server" in flags(found) and path not in NOT_CLIENTS
}
# They try again for a minute.
PATIENT = {"batches watch", "jobs watch", "jobs export", "stats watch", "suppressions export"}
# What a command needs besides its required arguments and options.
MORE = {
    "api-keys create": ("--operator",),
    "batches update": ("--subject", "Hi"),
    "held cancel": ("--all",),
    "held release": ("--all",),
    "jobs cancel": ("1",),
    "jobs reschedule": ("--delay", "1h"),
    "jobs retry": ("--batch", "1"),
    "schedule": ("--subject", "Hi", "--body", "Hello"),
    "senders update": ("--hourly-limit", "7"),
    "stats forecast": ("--sender", "1", "--recipient-count", "1"),
    "users set": ("--senders", "3"),
    "webhooks update": ("--disable",),
}


def words_of(path: str, people: Path) -> list[str]:
    """Return a command with a value for each argument and option that it requires."""
    words = path.split()
    for each in CLIENTS[path].params:
        if each.required:
            words += [*each.opts[:1]] if each.param_type_name == "option" else []
            words.append(_value(each, people))
    return [*words, *MORE.get(path, ())]


def _value(each: Any, people: Path) -> str:
    annotation = each.type_descriptor.annotation
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return str(next(iter(annotation)).value)
    known = {"file": str(people), "email": "a@b.org", "recipient": "a@b.org", "filter_": "test"}
    known |= {"url": "https://example.com/hook", "kind": "user", "address": "a@b.org"}
    return known.get(each.name, "1")


def error_of(words: list[str], exit_code: int = 1) -> Any:
    """Run a command that must fail, and return its error."""
    done = run([*words, "-o", "json"])
    assert done.exit_code == exit_code, (words, done)
    error = json.loads(done.stderr.splitlines()[-1])["error"]
    assert error.keys() >= {"code", "reason", "message", "violations", "metadata"}
    assert error["message"], words
    return error


@pytest.fixture
def people(tmp_path: Path) -> Path:
    file = tmp_path / "people.csv"
    file.write_text("email\na@b.org\n", encoding="utf-8")
    return file


@pytest_asyncio.fixture
async def scheduler(database_url: str, redis_url: str) -> AsyncIterator[Scheduler]:
    async with running_scheduler(database_url, redis_url, auth="keys") as running:
        yield running


def test_a_command_fails_if_nothing_answers(people: Path) -> None:
    for path in CLIENTS.keys() - PATIENT:
        server = ["--server", "127.0.0.1:1", "--timeout", "50ms"]
        error = error_of([*words_of(path, people), *server])
        # On a busy machine, the time may end before the connection is refused.
        assert error["code"] in ("UNAVAILABLE", "DEADLINE_EXCEEDED"), path
        assert not error["reason"], path
        assert "127.0.0.1:1" in error["message"], path
        assert error["grpc_message"], path


def test_a_command_fails_with_a_wrong_option(people: Path) -> None:
    for path in CLIENTS:
        error = error_of([*words_of(path, people), "--bogus"], exit_code=2)
        assert error["reason"] == "USAGE_ERROR", path
        assert "--bogus" in error["message"], path


async def test_a_command_fails_with_a_wrong_key(
    scheduler: Scheduler, people: Path, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    key.write_text(f"outbox_{'a' * 16}_{'b' * 43}", encoding="utf-8")
    server = ["--server", scheduler.address, "--api-key-file", str(key)]
    for path in CLIENTS:
        error = await asyncio.to_thread(error_of, [*words_of(path, people), *server])
        wanted = "UNAUTHENTICATED"
        if error["code"] != wanted and path.split()[0] in ("dispatcher", "stats", "top"):
            # The scheduler has no such method.
            wanted = "UNIMPLEMENTED"
        assert error["code"] == wanted, (path, error)


async def test_a_command_fails_with_an_unknown_id(
    database_url: str, redis_url: str, people: Path
) -> None:
    checked = 0
    async with running_scheduler(database_url, redis_url) as scheduler:
        for path, found in CLIENTS.items():
            words = [*words_of(path, people), "--server", scheduler.address, "--user", "ann"]
            ids = [each for each in found.params if each.required and each.name.endswith("_id")]
            if ids and not path.startswith(("stats", "api-keys")):
                error = await asyncio.to_thread(error_of, words)
                assert error["code"] == "NOT_FOUND", (path, error)
                assert error["reason"].endswith("_NOT_FOUND"), (path, error)
                checked += 1
    assert checked > 15
