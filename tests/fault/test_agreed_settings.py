"""Processes with other settings, and settings that change while mail is sent, as SMTP sees them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.shared.agreed.storage import change_agreed
from outbox_server.shared.agreed.values import AgreedValues
from outbox_server.shared.states import JobState
from tests.commands import run
from tests.dispatchers import DispatcherProcess, options, process, running, settings_of
from tests.eventually import eventually
from tests.smtp_servers import ScriptedServer, Succeed, Wait
from tests.world import Mail, World, at_least, gap_of, jobs_in, mails_of, most_of

Configure = Callable[..., dict[str, str]]


@pytest.fixture
def configure(
    database_url: str, redis_url: str, inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> Configure:
    """Return a function that returns settings. Commands of this process find the same stores."""
    monkeypatch.setenv("OUTBOX_DATABASE_URL", database_url)
    monkeypatch.setenv("OUTBOX_REDIS_URL", redis_url)
    return partial(options, database_url, redis_url, inbox.url)


async def change(world: World, **wanted: Any) -> None:
    """Change stored settings, as `outbox settings set` does."""
    async with world.engine.begin() as connection:
        await change_agreed(connection, wanted, AgreedValues.from_settings(world.settings), "test")


@pytest.mark.parametrize(
    ("variable", "first", "second"),
    [
        ("shards", "1", "4"),
        ("rate_window", "20s", "5s"),
    ],
)
async def test_a_process_with_another_value_does_not_start_and_says_both_in_one_line(
    configure: Configure, tmp_path: Path, variable: str, first: str, second: str
) -> None:
    values = configure(**{variable: first})
    other = tmp_path / "other.log"
    async with running(settings_of(values)) as dispatcher:
        await eventually(dispatcher.serving)
        async with process(values | {variable: second}, other) as refused:
            assert await refused.exit_code() == 2
        async with process(values, tmp_path / "same.log") as same:
            await eventually(same.serving)
        assert await dispatcher.serving()
    [line] = other.read_text().splitlines()
    assert line.startswith(f"OUTBOX_{variable.upper()} is {second} here, and {first} for")
    assert line.endswith("change the value of all processes by `outbox settings set`")


async def test_a_process_without_the_variable_uses_the_stored_value(
    configure: Configure, inbox: Inbox
) -> None:
    values = configure(min_gap="300ms", shards=2)
    async with World(settings_of(values)) as world:
        senders = [await world.sender() for _ in range(2)]
        async with running(settings_of(values)) as first:
            await eventually(first.serving)
        silent = {name: text for name, text in values.items() if name not in ("min_gap", "shards")}
        async with running(settings_of(silent)), running(settings_of(silent)):
            for sender in senders:
                await world.schedule(sender, 4)
            await eventually(world.done)
        for sender in senders:
            assert gap_of(inbox.mails, sender) >= 0.3
        assert len(inbox.mails) == 8


def late_overshoot(
    mails: Iterable[Mail], sender: int, exempt: set[int], window: float, limit: int
) -> list[int]:
    """Return the counts above the limit of the windows that end with a mail not in `exempt`."""
    all_of = mails_of(mails, sender)
    counts = []
    for mail in all_of:
        if not set(jobs_in([mail])) <= exempt:
            until = mail.received_at
            counts.append(sum(until - window < one.received_at <= until for one in all_of))
    return [count for count in counts if count > limit]


async def test_two_dispatchers_keep_the_old_and_then_the_new_window_and_gap(
    configure: Configure, inbox: Inbox, tmp_path: Path
) -> None:
    values = configure(rate_window="1s", min_gap="100ms")
    limit = 4
    async with AsyncExitStack() as stack:
        world = await stack.enter_async_context(World(settings_of(values)))
        senders = [await world.sender(limit=limit) for _ in range(6)]
        for sender in senders:
            await world.schedule(sender, 20)
        for number in range(2):
            await stack.enter_async_context(process(values, tmp_path / f"{number}.log"))
        await eventually(partial(at_least, 26, inbox.mails))

        words = ["settings", "set", "--rate-window", "3s", "--min-gap", "300ms", "--wait", "0s"]
        done = await asyncio.to_thread(run, [*words, "-o", "json"])
        changed = await world.in_state(
            JobState.SENDING, JobState.SENT, JobState.FAILED, JobState.UNCERTAIN
        )
        assert json.loads(done.stdout)["changed"] == {
            "rate_window": {"before": "1s", "after": "3s"},
            "min_gap": {"before": "100ms", "after": "300ms"},
        }
        before = len(inbox.mails)
        await eventually(partial(at_least, before + 20, inbox.mails))
        middle = list(inbox.mails)
        shorter = await asyncio.to_thread(
            run, ["settings", "set", "--rate-window", "500ms", "-o", "json"]
        )
        assert json.loads(shorter.stdout)["settings"]["rate_window"] == "500ms"
        await eventually(world.done)

    assert len(changed) < 120 - 20
    for sender in senders:
        # The first window is the strictest until the change, and the second one afterwards.
        early = [mail for mail in middle if set(jobs_in([mail])) <= changed]
        assert most_of(early, sender, settings_of(values).rate_window) <= limit
        assert late_overshoot(middle, sender, changed, 3.0, limit) == []
        assert gap_of(inbox.mails, sender) >= 0.1
        late = [mail for mail in middle if not set(jobs_in([mail])) <= changed]
        assert gap_of(late, sender) >= 0.3
    assert set(jobs_in(inbox.mails).values()) == {1}
    assert len(inbox.mails) == 120


async def test_one_shard_then_four_then_one_while_mail_is_sent(
    configure: Configure, inbox: Inbox, tmp_path: Path
) -> None:
    values = configure(rate_window="1s", min_gap="150ms", shards=1)
    limit = 5
    async with AsyncExitStack() as stack:
        world = await stack.enter_async_context(World(settings_of(values)))
        senders = [await world.sender(limit=limit) for _ in range(8)]
        for sender in senders:
            await world.schedule(sender, 16)
        paused = await stack.enter_async_context(process(values, tmp_path / "paused.log"))
        await stack.enter_async_context(process(values, tmp_path / "other.log"))
        for sent, shards in ((24, "4"), (64, "1")):
            await eventually(partial(at_least, sent, inbox.mails))
            # It goes on with the old shards when the other one has loaded the new ones.
            await pause_between_transactions(paused, world)
            done = await asyncio.to_thread(run, ["settings", "set", "--shards", shards])
            paused.resume()
            assert done.exit_code == 0, done.stderr
            assert f"{shards} of {shards} shards are loaded" in done.stderr
        await eventually(world.done)
        await world.check_counts()

    for sender in senders:
        assert gap_of(inbox.mails, sender) >= 0.15
        assert most_of(inbox.mails, sender, settings_of(values).rate_window) <= limit
    assert set(jobs_in(inbox.mails).values()) == {1}
    assert len(inbox.mails) == 128


async def pause_between_transactions(paused: DispatcherProcess, world: World) -> None:
    """Pause a process while it has no transaction, whose locks the other processes would wait for.

    A transaction that stays open may be one of the others that is slow. Then this is tried again.
    """
    while True:
        paused.pause()
        kept = await transactions(world)
        await asyncio.sleep(0.5)
        if not kept & await transactions(world):
            return
        paused.resume()
        await asyncio.sleep(0.1)


async def transactions(world: World) -> set[tuple[int, datetime]]:
    """Return the transactions that are open: the process of PostgreSQL, and the start of each."""
    rows = await world.sql(
        "SELECT pid, xact_start FROM pg_stat_activity"
        " WHERE datname = current_database() AND xact_start IS NOT NULL AND pid <> pg_backend_pid()"
    )
    return {(row.pid, row.xact_start) for row in rows}


async def test_a_send_in_flight_during_a_change_ends_for_the_next_key_space_too(
    database_url: str, redis_url: str, tmp_path: Path
) -> None:
    reply = Wait()
    # The first body waits for its reply; all others are answered at once.
    plan = {"body": [(reply, Succeed()), *([Succeed()] * 9)]}
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(ScriptedServer(plan))
        # Without the end of that send, the lease in the next key space would last a minute.
        values = options(
            database_url, redis_url, server.url, min_gap="500ms", lease="60s", shutdown_grace="30s"
        )
        world = await stack.enter_async_context(World(settings_of(values)))
        sender = await world.sender()
        other = await world.sender()
        await world.schedule(sender, 2)
        log = tmp_path / "first.log"
        await stack.enter_async_context(process(values, log))
        await eventually(lambda: server.waiting["body"])
        await change(world, shards=2)
        # Another dispatcher loads the next key space, with the lease of the send in flight.
        values_now = values | {"shards": "2"}
        await stack.enter_async_context(running(settings_of(values_now)))
        await world.schedule(other, 1, load=False)
        await eventually(lambda: world.done(other))
        assert len(server.taken) == 2
        await eventually(lambda: "settings_changed" in log.read_text())

        reply.event.set()
        replied = time.time()
        await eventually(lambda: world.done(sender), deadline=30)
        _, second = mails_of(server.taken, sender)
        assert second.started_at >= replied + 0.5
        assert set(jobs_in(server.taken).values()) == {1}
