"""`outbox version`: the release of this command and of the servers."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from outbox_server.deploy.ports import free_port
from outbox_server.shared.database.schema import REVISION
from outbox_server.shared.rpc.server_info import installed_version
from tests.commands import run
from tests.eventually import eventually
from tests.scheduler_stack import running_scheduler


async def test_version_shows_every_server_that_answers(
    database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    nowhere = f"127.0.0.1:{free_port()}"
    for name in ("DISPATCHER", "STATS"):
        monkeypatch.setenv(f"OUTBOX_{name}_LISTEN", nowhere)
    async with running_scheduler(database_url, redis_url) as scheduler:
        monkeypatch.setenv("OUTBOX_SCHEDULER_LISTEN", scheduler.address)

        async def described() -> list[dict[str, str]]:
            done = await asyncio.to_thread(run, ["version", "-o", "json"])
            assert done.exit_code == 0, done.stderr
            document = json.loads(done.stdout)
            assert document["version"] == installed_version()
            servers: list[dict[str, str]] = document["servers"]
            return servers if servers[0].get("schema_revision") else []

        first, *others = await eventually(described)
        words = ["version", "--server", scheduler.address]
        table = await asyncio.to_thread(run, words)
    assert (first["service"], first["version"]) == ("scheduler", installed_version())
    assert (first["schema_revision"], first["code_schema_revision"]) == (REVISION, REVISION)
    assert [one["error"] for one in others] == [f"no answer from {nowhere}"] * 2
    assert table.exit_code == 0
    assert table.stdout.splitlines()[-1].split()[1:3] == ["scheduler", installed_version()]


def test_version_of_a_server_that_does_not_answer_fails() -> None:
    address = f"127.0.0.1:{free_port()}"
    done = run(["version", "--server", address])
    assert done.exit_code == 1
    assert done.stderr.startswith(f"outbox: nothing listens at {address} (--server)")
