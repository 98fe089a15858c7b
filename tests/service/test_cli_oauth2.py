"""`outbox senders` with presets and OAuth 2.0 credentials, against a real scheduler."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from outbox_server.deploy.certificates import self_signed
from outbox_server.shared.secrets import SecretBox, generate_key
from tests.commands import CommandResult, outbox
from tests.for_each import for_each_case
from tests.scheduler_stack import Scheduler, running_scheduler

KEY = generate_key()
GMAIL = ("--smtp-preset", "gmail", "--smtp-username", "me@example.com", "--oauth2-client-id", "id")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("secret").write_text("a-client-secret\r\n")
    Path("token").write_text("1//refresh-token\n")


@pytest.fixture
def certificate(tmp_path: Path) -> str:
    return self_signed(tmp_path).public.read_text()


@pytest.fixture
async def scheduler(database_url: str, redis_url: str) -> AsyncIterator[Scheduler]:
    async with running_scheduler(database_url, redis_url, encryption_keys=KEY) as running:
        yield running


async def senders(scheduler: Scheduler, *words: str, stdin: str = "") -> CommandResult:
    """Run a command that reads `stdin`."""
    return await outbox(scheduler, "senders", *words, stdin=stdin.encode())


async def create(scheduler: Scheduler, *words: str, stdin: str = "") -> CommandResult:
    who = ("--user", "demo", "--email", "me@example.com", "-o", "json")
    return await senders(scheduler, "create", *who, *words, stdin=stdin)


def stored(scheduler: Scheduler) -> list[str | None]:
    ((secret, token),) = scheduler.rows(
        "SELECT client_secret, refresh_token FROM oauth2_credentials"
    )
    box = SecretBox([KEY])
    return [None if each is None else box.decrypt(each) for each in (secret, token)]


async def test_a_preset_and_two_files_create_a_gmail_sender(scheduler: Scheduler) -> None:
    files = ("--oauth2-client-secret-file", "secret", "--oauth2-refresh-token-file", "token")
    done = await create(scheduler, *GMAIL, *files)
    assert done.exit_code == 0, done.stderr
    smtp = json.loads(done.stdout)["smtp"]
    assert (smtp["host"], smtp["port"]) == ("smtp.gmail.com", 587)
    shown = {name: value for name, value in smtp["oauth2"].items() if value}
    assert shown == {
        "token_url": "https://oauth2.googleapis.com/token",
        "client_id": "id",
        "scope": "https://mail.google.com/",
        "client_secret_set": True,
        "refresh_token_set": True,
    }
    assert stored(scheduler) == ["a-client-secret", "1//refresh-token"]


async def test_a_private_ca_can_be_combined_with_a_preset_and_a_token(
    scheduler: Scheduler, certificate: str
) -> None:
    words = ("--oauth2-refresh-token-file", "token", "--smtp-ca", "127.0.0.1.crt")
    done = await create(scheduler, *GMAIL, *words)
    assert done.exit_code == 0, done.stderr
    smtp = json.loads(done.stdout)["smtp"]
    assert smtp["ca_certificates"] == certificate
    assert smtp["oauth2"]["refresh_token_set"]


async def test_a_secret_may_come_from_stdin_and_an_update_replaces_the_whole_endpoint(
    scheduler: Scheduler,
) -> None:
    made = json.loads((await create(scheduler)).stdout)
    assert "smtp" not in made
    done = await senders(
        scheduler,
        *("update", made["sender_id"], "--smtp-preset", "microsoft365"),
        *("--smtp-username", "me@example.com", "--oauth2-client-id", "id"),
        *("--oauth2-tenant", "example.com", "--oauth2-client-secret-file", "-", "-o", "json"),
        stdin="from-stdin\n",
    )
    assert done.exit_code == 0, done.stderr
    oauth2 = json.loads(done.stdout)["smtp"]["oauth2"]
    assert "/example.com/" in oauth2["token_url"]
    assert (oauth2["client_secret_set"], oauth2["refresh_token_set"]) == (True, False)
    assert stored(scheduler) == ["from-stdin", None]


@for_each_case(
    "words said",
    [
        (("--oauth2-client-id", "id"), "--smtp-preset"),
        (("--oauth2-refresh-token-file", "token"), "--smtp-preset"),
        (("--smtp-ca", "token"), "--smtp-preset"),
        ((*GMAIL, "--oauth2-refresh-token-file", "nowhere"), "nowhere cannot be read"),
        (
            (*GMAIL, "--oauth2-client-secret-file", "-", "--oauth2-refresh-token-file", "-"),
            "cannot both be",
        ),
        (("--smtp-preset", "hotmail"), "gmail, microsoft365"),
    ],
)
async def test_wrong_options_are_a_usage_error(
    scheduler: Scheduler, words: tuple[str, ...], said: str
) -> None:
    done = await create(scheduler, *words)
    assert done.exit_code == 2, done.stderr
    assert said in " ".join(done.stderr.replace("\u2502", " ").split())
    assert scheduler.value("SELECT count(*) FROM senders") == 0
