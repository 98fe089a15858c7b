"""After a loss of Redis, senders whose mail is due do not wait for the others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from datetime import timedelta

import pytest
import pytest_asyncio

from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.services.dispatcher import server as server_module
from outbox_server.shared.heads import rebuilding as rebuilding_module
from outbox_server.shared.heads.loader import HeadLoader
from tests.dispatchers import options, running, settings_of
from tests.eventually import PATIENCE, eventually
from tests.world import World, jobs_in

WAITING, DUE = 60, 5
LATER = timedelta(hours=1)


@pytest_asyncio.fixture
async def world(
    database_url: str, redis_url: str, inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[World]:
    """An installation whose rebuilds read its senders in several parts."""
    monkeypatch.setattr(rebuilding_module, "_FIRST_READ", 7)
    monkeypatch.setattr(rebuilding_module, "_LONGEST_READ", 14)
    async with World(settings_of(options(database_url, redis_url, inbox.url))) as world:
        yield world


class HeldLoader(HeadLoader):
    """Loads the senders in `held` only once `go` is set."""

    held: frozenset[int] = frozenset()
    go = asyncio.Event()

    async def load(self, sender_ids: Iterable[int], *, committed: bool) -> None:
        ids = list(sender_ids)
        if self.held.intersection(ids):
            await asyncio.wait_for(self.go.wait(), PATIENCE)
        await super().load(ids, committed=committed)


async def test_due_mail_arrives_before_the_senders_that_only_wait_are_loaded(
    world: World, inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The senders with due mail come last in the order of ids.
    waiting = [await world.sender() for _ in range(WAITING)]
    due = [await world.sender() for _ in range(DUE)]
    later = [job for one in waiting for job in await world.schedule(one, due=LATER, load=False)]
    now = [job for one in due for job in await world.schedule(one, load=False)]
    monkeypatch.setattr(HeldLoader, "held", frozenset(waiting))
    monkeypatch.setattr(HeldLoader, "go", asyncio.Event())
    monkeypatch.setattr(server_module, "HeadLoader", HeldLoader)
    async with running(world.settings):
        await eventually(lambda: world.done(*due))
        assert jobs_in(inbox.mails) == dict.fromkeys(now, 1)
        assert not await world.redis.exists("outbox:{0}:generation"), "the others are held"

        HeldLoader.go.set()
        await eventually(lambda: world.redis.exists("outbox:{0}:generation"))
        await world.sql("UPDATE email_jobs SET scheduled_at = now() WHERE id = ANY(%s)", later)
        await world.loader.load(waiting, committed=True)
        await eventually(world.done)

    assert jobs_in(inbox.mails) == dict.fromkeys(later + now, 1)


async def test_the_longest_overdue_senders_are_loaded_first(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebuilding_module, "_FIRST_READ", 100)
    monkeypatch.setattr(rebuilding_module, "_LOADS", 1)
    senders = [await world.sender() for _ in range(20)]
    for place, sender in enumerate(senders):
        await world.schedule(sender, due=timedelta(minutes=-1 - place), load=False)
    order: list[int] = []
    loader = HeadLoader(world.engine, world.queues, world.settings)
    load = loader.load

    async def note(sender_ids: Iterable[int], *, committed: bool) -> None:
        order.extend(ids := list(sender_ids))
        await load(ids, committed=committed)

    monkeypatch.setattr("outbox_server.shared.heads.loader._CHUNK", 4)
    monkeypatch.setattr(loader, "load", note)
    assert await loader.rebuild(world.queues[0])

    assert order == senders[::-1]


@pytest.mark.parametrize("kept", [0, 10, 1_000])
async def test_however_few_senders_fit_into_memory_all_are_loaded(
    world: World, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    monkeypatch.setattr(rebuilding_module, "_MOST_LATER", kept)
    senders = [await world.sender() for _ in range(40)]
    for sender in senders:
        await world.schedule(sender, due=LATER, load=False)

    assert await world.loader.rebuild(world.queues[0])

    assert await world.redis.zcount("outbox:{0}:ready", 0, 10**13) == len(senders)
