"""`outbox settings` on a real database, with and without dispatchers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from functools import partial

import pytest

from outbox_server.deploy.embedded.inbox import Inbox
from tests.commands import CommandResult, run
from tests.dispatchers import options, running, settings_of
from tests.eventually import eventually
from tests.world import World

DEFAULTS = {
    "shards": 1,
    "rate_window": "1h",
    "min_gap": "2s",
    "user_hourly_limit": 0,
    "user_gap": "0ms",
    "uncertain_policy": "resend",
}

Settings = Callable[..., "asyncio.Future[CommandResult]"]


@pytest.fixture
def settings(database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Return a function that runs a command of the group on the test's stores."""
    monkeypatch.setenv("OUTBOX_DATABASE_URL", database_url)
    monkeypatch.setenv("OUTBOX_REDIS_URL", redis_url)

    def command(*words: str) -> asyncio.Future[CommandResult]:
        return asyncio.ensure_future(asyncio.to_thread(run, ["settings", *words]))

    return command


async def test_the_first_set_stores_the_other_values_of_the_environment(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = await settings("show", "-o", "json")
    assert json.loads(empty.stdout) == {"settings": None}
    assert "no process has started yet" in (await settings("show")).stderr

    done = await settings("set", "--shards", "4", "--user-gap", "1s", "--wait", "0s", "-o", "json")
    after = DEFAULTS | {"shards": 4, "user_gap": "1s"}
    assert json.loads(done.stdout) == {
        "changed": {
            "shards": {"before": 1, "after": 4},
            "user_gap": {"before": "0ms", "after": "1s"},
        },
        "settings": after,
    }
    assert json.loads((await settings("show", "-o", "json")).stdout) == {"settings": after}
    [change] = json.loads((await settings("history", "-o", "json")).stdout)["changes"]
    assert change["before"] == {"shards": "1", "user_gap": "0ms"}
    assert change["after"] == {"shards": "4", "user_gap": "1s"}
    assert "@" in change["actor"]
    assert change["time"]

    monkeypatch.setenv("OUTBOX_SHARDS", "1")
    again = await settings("set", "--shards", "4")
    assert again.exit_code == 0
    assert "nothing changed" in again.stderr
    assert "OUTBOX_SHARDS is 1 here, and 4 for the whole installation" in again.stderr
    tables = [await settings(word) for word in ("show", "history")]
    assert all(table.exit_code == 0 and "user_gap" in table.stdout for table in tables)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("set",), "name at least one setting"),
        (("set", "--shards", "0"), "--shards"),
        (("set", "--rate-window", "soon"), "'soon' is not a duration"),
        (("set", "--uncertain-policy", "maybe"), "must be 'resend' or 'hold'"),
    ],
)
async def test_a_wrong_value_is_refused_and_names_its_option(
    settings: Settings, words: tuple[str, ...], complaint: str
) -> None:
    refused = await settings(*words)
    assert refused.exit_code == 2
    assert complaint in " ".join(refused.stderr.replace("│", " ").split())
    assert json.loads((await settings("show", "-o", "json")).stdout) == {"settings": None}


async def test_set_says_that_the_queue_is_not_loaded_if_no_dispatcher_runs(
    settings: Settings,
) -> None:
    done = await settings("set", "--shards", "2", "--wait", "300ms")
    assert done.exit_code == 1
    assert "does a dispatcher run?" in done.stderr
    stored = json.loads((await settings("show", "-o", "json")).stdout)
    assert stored["settings"]["shards"] == 2


async def test_a_running_dispatcher_adopts_a_value_that_its_environment_contradicts(
    settings: Settings, database_url: str, redis_url: str, inbox: Inbox
) -> None:
    values = options(database_url, redis_url, inbox.url, shards=1)
    async with World(settings_of(values)) as world, running(settings_of(values)) as dispatcher:
        await eventually(dispatcher.serving)
        done = await settings("set", "--shards", "3")
        assert done.exit_code == 0, done.stderr
        assert "3 of 3 shards are loaded" in done.stderr
        sender = await world.sender()
        await world.schedule(sender, load=False)
        await eventually(partial(world.done, sender))
        # At the same port.
        await eventually(dispatcher.serving)
