"""`outbox up` beside other users of the machine, who reach its ports and see its processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
import pytest_asyncio

from outbox_server.cli.addresses import read_endpoints
from outbox_server.cli.lazy import CommandFailed
from outbox_server.deploy.embedded.passwords import SUPERUSER
from outbox_server.deploy.embedded.stack import Servers
from tests.another_user import STRANGER
from tests.commands import run
from tests.eventually import PATIENCE, eventually
from tests.fault.test_up import (
    RunningUp,
    folder,
    new_folder,
    pasted,
    running,
)
from tests.processes import arguments_of, descendants

__all__ = ["folder"]
ROOT = Path(__file__).parents[2]
SMTP_SECRET = "relay-s3cret"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guarded() -> AsyncIterator[RunningUp]:
    """`outbox up` whose callers need an API key."""
    with new_folder() as path:
        async with running(path, OUTBOX_AUTH="keys") as one:
            yield one


def attempts(up: RunningUp) -> dict[str, list[str]]:
    """Return what another user of the machine can do."""
    stack = up.folder / ".outbox"
    request: dict[str, Any] = {
        "paths": [str(path) for path in stack.rglob("*") if path.is_file()],
        "folders": [str(path) for path in (stack, *stack.rglob("*")) if path.is_dir()],
        "pids": [up.process.pid, *descendants(up.process.pid)],
        "postgres": urlsplit(up.endpoints["database_url"]).port,
        "redis": urlsplit(up.endpoints["redis_url"]).port,
        "scheduler": up.endpoints["scheduler"],
    }
    assert len(request["paths"]) > 100
    done = subprocess.run(
        [sys.executable, "-m", "tests.another_user"],
        input=json.dumps(request),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


def secrets_of(up: RunningUp) -> dict[str, str]:
    stack = up.folder / ".outbox"
    lines = (stack / "postgres.pgpass").read_text().split()
    return {
        "redis": urlsplit(up.endpoints["redis_url"]).password or "",
        "encryption key": (stack / "encryption_key").read_text().strip(),
        "API key": (stack / "operator_key").read_text().strip(),
        **{line.split(":")[3]: line.split(":")[4] for line in lines},
    }


def all_arguments(up: RunningUp) -> str:
    """Return the arguments of all processes, as `ps` shows them to every user."""
    pids = (up.process.pid, *descendants(up.process.pid))
    return " ".join(word for pid in pids for word in arguments_of(pid))


async def test_another_user_of_the_machine_reads_nothing_and_logs_in_nowhere(
    guarded: RunningUp,
) -> None:
    sender = guarded.ask("senders", "create", "--user", "u", "--email", "a@example.com")
    (guarded.folder / "people.csv").write_text("email\nann@example.org\n")
    guarded.ask(
        *("schedule", "people.csv", "--sender", sender["sender_id"]),
        *("--subject", "Hello", "--body", "Good day"),
    )
    await eventually(lambda: len(guarded.mails()) == 1)
    found = attempts(guarded)
    if os.geteuid() != 0:  # we remain the owner of the files
        for name in ("read", "entered", "environments"):
            del found[name]
    assert found == {name: [] for name in found}
    # Neither does any file depend on the folder above it.
    stack = guarded.folder / ".outbox"
    open_ones = [
        path.name
        for pattern in ("*", "inbox/**/*", "logs/*", "valkey/*")
        for path in stack.glob(pattern)
        if path.stat().st_mode & 0o077 and path.name != ".gitignore"
    ]
    assert open_ones == []
    assert stack.stat().st_mode & 0o777 == 0o700


async def test_no_secret_is_an_argument_of_a_process_or_in_a_log_or_in_the_terminal(
    guarded: RunningUp,
) -> None:
    secrets = secrets_of(guarded)
    assert all(len(secret) >= 32 for secret in secrets.values())
    arguments = all_arguments(guarded)
    assert "valkey-server" in arguments
    logs = "".join(path.read_text() for path in (guarded.folder / ".outbox/logs").iterdir())
    printed = (guarded.folder / "stdout").read_text() + guarded.errors
    assert "redis       redis://:***@" in printed
    for name, secret in secrets.items():
        assert secret not in arguments, name
        assert secret not in logs, name
        assert secret not in printed, name


async def test_with_keys_the_printed_lines_work_and_a_key_of_a_user_sees_that_user_only(
    guarded: RunningUp,
) -> None:
    printed = (guarded.folder / "stdout").read_text()
    lines = re.findall(r"(?m)^  (\S.*)", printed)
    assert "ben@example.com" in pasted(guarded.folder, lines)
    # Commands for operators find the database of this folder's stack.
    key = guarded.outbox("keys", "create", "--user", "u").stdout.strip()
    assert key.startswith("obx_")
    kinds = [one["kind"] for one in guarded.ask("keys", "list")["keys"]]
    assert kinds == ["OPERATOR", "USER"]
    with pytest.MonkeyPatch.context() as patch:
        # A caller's own key takes precedence over the operator's.
        patch.setenv("OUTBOX_API_KEY", key)
        refused = guarded.outbox("senders", "list", "--user", "other")
        assert refused.exit_code == 1
        assert "USER_MISMATCH" in refused.stderr
        assert "senders" in guarded.ask("senders", "list", "--user", "u")
    versions = guarded.ask("version")["servers"]
    assert sorted(one["service"] for one in versions) == ["dispatcher", "scheduler", "stats"]


def as_before(folder: Path, url: str) -> None:
    """Let every local user in, as earlier releases did."""
    with psycopg.connect(url, autocommit=True) as connection:
        for role in ("outbox", SUPERUSER):
            connection.execute(f"ALTER ROLE {role} PASSWORD NULL".encode())
    (folder / "postgres/pg_hba.conf").write_text("host all all all trust\n")
    (folder / "postgres.pgpass").unlink()
    for path in (folder, folder / "inbox", folder / "inbox/new"):
        path.chmod(0o755)


async def test_a_data_folder_of_an_earlier_release_is_closed_and_keeps_its_data(
    folder: Path,
) -> None:
    async with Servers(folder, durable=False) as servers:
        admin = servers.postgres.url("outbox", SUPERUSER)
        with psycopg.connect(servers.database_url, autocommit=True) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 7 AS value")
        as_before(folder, admin)
        # The cluster is not shut down cleanly, so it must recover.
        await servers.postgres.kill()
    async with Servers(folder, durable=False) as servers:
        with psycopg.connect(servers.database_url) as connection:
            assert connection.execute("SELECT value FROM kept").fetchall() == [(7,)]
        for role in ("outbox", SUPERUSER):
            bare = servers.postgres.url("outbox", role).partition("?")[0]
            with pytest.raises(psycopg.OperationalError, match="no password supplied"):
                psycopg.connect(bare)
        assert {
            path.stat().st_mode & 0o777 for path in (folder, folder / "inbox", folder / "inbox/new")
        } == {0o700}


def test_a_relay_with_a_password_is_named_in_a_file(folder: Path) -> None:
    url = f"smtp://user:{SMTP_SECRET}@127.0.0.1:25"
    refused = run(["up", "--smtp", url])
    assert refused.exit_code == 2
    shown = " ".join(refused.stderr.replace("│", " ").split())
    assert "name it with --smtp-file" in shown
    assert SMTP_SECRET not in shown
    (folder / "relay").write_text("127.0.0.1:25\n")
    wrong = run(["up", "--smtp-file", str(folder / "relay")])
    assert "must be one of smtp://" in " ".join(wrong.stderr.replace("│", " ").split())
    both = run(["up", "--smtp", "smtp://127.0.0.1:25", "--smtp-file", str(folder / "relay")])
    assert "give only one of them" in " ".join(both.stderr.replace("│", " ").split())


def test_no_command_follows_the_file_of_another_user(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    planted = folder / ".outbox/endpoints.json"
    planted.parent.mkdir()
    planted.write_text('{"scheduler": "127.0.0.1:1"}')
    assert read_endpoints() is not None
    if os.geteuid() == 0:
        os.chown(planted, STRANGER, STRANGER)
        os.chown(planted.parent, STRANGER, STRANGER)
    else:  # only root can give files to another user
        monkeypatch.setattr(os, "geteuid", lambda: STRANGER)
    with pytest.raises(CommandFailed, match=r"belongs to user \d+, who could redirect"):
        read_endpoints()
    # A folder of another user is not used for a stack either.
    refused = run(["up"])
    assert refused.exit_code == 1
    assert "use another folder, or change its owner" in refused.stderr
