"""Every example in `--help` does what it says, with the ids and files that a user would have."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
from collections.abc import AsyncIterator
from pathlib import Path
from string import Template
from typing import Any, Final

import pytest

from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.deploy.ports import free_port
from outbox_server.shared.secrets import generate_key
from outbox_server.shared.settings import load_settings
from tests.command_tree import examples
from tests.commands import CommandResult, run
from tests.scheduler_stack import running_scheduler
from tests.stats_stack import running_stats

# They run whole stacks or never end, or need a dispatcher. Their own tests run them.
ELSEWHERE: Final = {"up", "drill", "gateway", "jobs watch", "settings set"}
# It draws on a terminal, which a test does not have.
MORE: Final = {"top": ("-o", "json")}
# The job is in another state than the example assumes.
REFUSED: Final = {"jobs resolve": "NOT_UNCERTAIN"}
EXAMPLE: Final = re.compile(r"(?:export \w+=\$\()?((?:\w+=\S+ )*)outbox (.*?)\)?")
KEY: Final = generate_key()
FILES: Final = {
    "people.csv": "email,first_name\nann@example.com,Ann\nbob@example.com,Bob\n",
    "unsubscribed.csv": "email\ncarl@example.com\n",
    "secret.txt": "a-client-secret\n",
    "token.txt": "1//refresh-token\n",
}


@pytest.fixture
async def servers(
    database_url: str,
    redis_url: str,
    inbox: Inbox,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[None]:
    """A scheduler and a stats service, to which the variables of this process lead."""
    health = f"127.0.0.1:{free_port()}"
    monkeypatch.chdir(tmp_path)
    own = {
        "encryption_keys": KEY,
        "health_listen": health,
        "smtp_url": f"smtp://127.0.0.1:{inbox.port}",
    }
    async with (
        running_scheduler(database_url, redis_url, **own) as scheduler,
        running_stats(
            load_settings(
                database_url=database_url,
                redis_url=redis_url,
                stats_listen="127.0.0.1:0",
                auth="off",
            )
        ) as stats,
    ):
        for name, value in {
            "DATABASE_URL": database_url,
            "REDIS_URL": redis_url,
            "SCHEDULER_LISTEN": scheduler.address,
            "STATS_LISTEN": stats,
            "HEALTH_LISTEN": health,
            "ENCRYPTION_KEYS": KEY,
        }.items():
            monkeypatch.setenv(f"OUTBOX_{name}", value)
        yield


def answer(*words: str) -> Any:
    """Run a command that must succeed, and return its JSON document."""
    done = run([*words, "-o", "json"])
    assert done.exit_code == 0, (words, done)
    return json.loads(done.stdout)


def prepare() -> dict[str, str]:
    """Create what the examples name, and return its ids."""
    for name, text in FILES.items():
        Path(name).write_text(text, encoding="utf-8")
    owner = ("--user", "acme")
    sender = answer("senders", "create", *owner, "--email", "shop@example.com")["sender_id"]
    content = ("--subject", "Hello {{ first_name }}", "--body", "Good to see you.")
    batch = answer("schedule", "people.csv", "--sender", sender, *content)["batch"]["batch_id"]
    webhook = answer("webhooks", "create", "https://example.com/outbox", *owner)["webhook_id"]
    Path("first.key").write_text(run(["keys", "generate-api-key"]).stdout, encoding="utf-8")
    return {
        "SENDER": sender,
        "BATCH": batch,
        "WEBHOOK": webhook,
        "JOB": answer("jobs", "list", *owner)["email_jobs"][-1]["email_job_id"],
        "KEY_ID": answer("keys", "create", *owner, "--name", "old")["key_id"],
    }


def as_typed(
    path: str, example: str, ids: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> CommandResult:
    """Run an example as a shell would, with a user's ids in place of its variables."""
    text = example.replace("\\\n", " ").replace("KEY_ID", ids["KEY_ID"])
    found = EXAMPLE.fullmatch(text)
    assert found
    variables, command = found.groups()
    with monkeypatch.context() as patch:
        for pair in variables.split():
            name, _, value = pair.partition("=")
            if name != "OUTBOX_HEALTH_LISTEN":
                patch.setenv(name, value.replace("NEW,OLD", f"{generate_key()},{KEY}"))
        return run([*shlex.split(Template(command).substitute(ids)), *MORE.get(path, ())])


@pytest.mark.usefixtures("servers")
async def test_every_example_in_help_does_what_it_says(
    monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests
) -> None:
    ids = await asyncio.to_thread(prepare)
    for path, example in examples():
        if path in ELSEWHERE or "--wait" in example:
            continue
        with subtests.test(f"{path}: {example}"):
            if path.startswith("held "):
                await asyncio.to_thread(answer, "held", "begin")
            done = await asyncio.to_thread(as_typed, path, example, ids, monkeypatch)
            if path in REFUSED:
                assert REFUSED[path] in done.stderr
            else:
                assert done.exit_code == 0, done
