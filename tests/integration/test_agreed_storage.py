"""The stored settings: who stores them first, and what a change refuses from then on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
import pytest_asyncio

from outbox_server.services.dispatcher.cooling import CooldownRules
from outbox_server.services.dispatcher.ended_claims import UnsentJob
from outbox_server.services.dispatcher.settler import Settler
from outbox_server.services.dispatcher.slots import Slots
from outbox_server.shared.agreed.storage import (
    ACTION,
    change_agreed,
    read_agreed,
    read_or_store,
)
from outbox_server.shared.agreed.values import AgreedSettings, AgreedValues
from outbox_server.shared.database.audit_events import read_changes
from outbox_server.shared.errors import ConfigurationError
from outbox_server.shared.heads.loader import HeadLoader
from outbox_server.shared.queue.connection import open_queues
from outbox_server.shared.queue.old_keys import OldKeys
from outbox_server.shared.states import JobState
from tests.dispatchers import options, settings_of
from tests.eventually import PATIENCE, eventually
from tests.marked_jobs import mark_refs, refs
from tests.world import World

LEASE = timedelta(minutes=1)


@pytest_asyncio.fixture
async def world(database_url: str, redis_url: str) -> AsyncIterator[World]:
    settings = settings_of(options(database_url, redis_url, "smtp://127.0.0.1:1", lease="60s"))
    async with World(settings) as world:
        yield world


def values(world: World, **changes: Any) -> AgreedValues:
    return AgreedValues.from_settings(world.settings.model_copy(update=changes))


async def change(world: World, **wanted: Any) -> AgreedSettings:
    async with world.engine.begin() as connection:
        return (await change_agreed(connection, wanted, values(world), "ann@host")).after


async def mark(world: World, job: int, key_space: str) -> int:
    async with world.engine.begin() as connection:
        return len(await mark_refs(connection, refs([job]), LEASE, key_space))


async def test_of_processes_that_start_at_once_one_stores_its_values(world: World) -> None:
    starts = [read_or_store(world.engine, values(world, shards=number)) for number in (1, 2, 3, 4)]
    found = await asyncio.gather(*starts)
    assert len(set(found)) == 1
    assert found[0].values.shards in (1, 2, 3, 4)
    assert found[0].key_space == ""


async def test_a_change_is_recorded_with_its_author_and_both_values(world: World) -> None:
    await read_or_store(world.engine, values(world))
    after = await change(world, shards=4, min_gap=timedelta(seconds=3))
    assert after.key_space
    assert after.old_key_spaces == ("",)
    async with world.engine.connect() as connection:
        assert await read_agreed(connection) == after
        [event] = await read_changes(connection, ACTION, 10)
    assert (event.actor, event.action) == ("ann@host", "settings.set")
    assert event.before == {"shards": "1", "min_gap": "0ms"}
    assert event.after == {"shards": "4", "min_gap": "3s"}
    assert event.happened_at is not None


async def test_a_change_to_the_same_values_changes_and_records_nothing(world: World) -> None:
    before = await read_or_store(world.engine, values(world))
    assert await change(world, shards=1) == before
    async with world.engine.connect() as connection:
        assert await read_changes(connection, ACTION, 10) == []


async def test_a_value_that_redis_does_not_depend_on_keeps_the_key_space(world: World) -> None:
    await read_or_store(world.engine, values(world))
    after = await change(world, uncertain_policy="hold")
    assert (after.values.uncertain_policy, after.key_space) == ("hold", "")


async def test_a_mark_of_an_earlier_key_space_is_refused(world: World) -> None:
    first, second = await world.schedule(await world.sender(), 2)
    assert await mark(world, first, "") == 1
    after = await change(world, shards=2)
    assert await mark(world, second, "") == 0
    assert await mark(world, second, after.key_space) == 1


async def test_a_change_waits_for_a_mark_under_way_and_a_later_mark_sees_it(world: World) -> None:
    first, second = await world.schedule(await world.sender(), 2)
    await read_or_store(world.engine, values(world))
    async with world.engine.connect() as marking, world.engine.connect() as changing:
        marked = await mark_refs(marking, refs([first]), LEASE)
        assert len(marked) == 1
        waiting = asyncio.create_task(
            change_agreed(changing, {"shards": 2}, values(world), "ann@host")
        )
        await eventually(lambda: _waits(world))
        assert not waiting.done()
        await marking.commit()
        after = (await waiting).after
        # Not committed yet: the mark waits for it, and then sees it.
        late = asyncio.create_task(mark(world, second, ""))
        await eventually(lambda: _waits(world))
        await changing.commit()
        assert await late == 0
        assert await mark(world, second, after.key_space) == 1


async def _waits(world: World) -> bool:
    rows = await world.sql(
        "SELECT 1 FROM pg_stat_activity WHERE datname = current_database()"
        " AND wait_event_type = 'Lock'"
    )
    return bool(rows)


async def test_a_load_into_an_earlier_key_space_leaves_the_marker_for_others(world: World) -> None:
    sender = await world.sender()
    await read_or_store(world.engine, values(world))
    await change(world, shards=2)
    await world.schedule(sender)
    assert await world.sql("SELECT 1 FROM head_markers")


async def test_a_send_that_ended_before_its_process_noticed_the_change_ends_in_both_key_spaces(
    world: World, statements: Any
) -> None:
    sender = await world.sender()
    [job] = await world.schedule(sender)
    await world.schedule(sender)
    [claim] = (await world.queues[0].claim(1)).claims
    async with statements.connect() as connection:
        [marked] = await mark_refs(connection, [claim.job], LEASE)
    after = await change(world, rate_window=timedelta(minutes=2))
    later = after.values.apply_to(world.settings)
    queues = open_queues(world.redis, later, key_space=after.key_space)
    successor = HeadLoader(world.engine, queues, later)
    await successor.load([sender], committed=False)
    lease_key = queues[0].keys.ready.replace("ready", f"lease:{sender}")
    assert await world.redis.zcard(lease_key) == 1

    slots = Slots(1, unproven=2)
    await slots.take_free()
    rules = CooldownRules.from_settings(world.settings)
    settler = Settler(
        statements, world.engine, world.loader, slots, rules, confirmed_at=lambda: 0.0
    )
    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        group.create_task(settler.run())
        settler.settle(UnsentJob(claim, marked))

        async def given_back() -> bool:
            return job in await world.in_state(JobState.SCHEDULED)

        await eventually(given_back)
        settler.follow(successor)

        async def ended() -> bool:
            return await world.redis.zcard(lease_key) == 0

        await eventually(ended)
        settler.close()
    found = {one.job for one in (await queues[0].claim(5)).claims}
    assert claim.job in found


async def test_only_the_keys_of_earlier_key_spaces_are_deleted(world: World) -> None:
    kept = ["outbox:{new.0}:ready", "outbox:{other.11}:due:1", "other:{0}:x", "outbox:{x}:y"]
    old = ["outbox:{0}:ready", "outbox:{12}:window:u:x", "outbox:{old.3}:life"]
    for key in (*kept, *old):
        await world.redis.set(key, "1")
    assert await OldKeys(world.redis, ["", "old"], LEASE).delete() == len(old)
    assert sorted(await world.redis.keys("*")) == sorted(kept)


async def test_keys_in_use_by_sends_of_an_earlier_key_space_are_left_for_a_while(
    world: World,
) -> None:
    await world.redis.set("outbox:{0}:ready", "1")
    old = OldKeys(world.redis, [""], LEASE)
    assert await old.delete_soon() == LEASE
    assert await world.redis.exists("outbox:{0}:ready")
    assert await old.delete_soon() > LEASE
    assert not await world.redis.exists("outbox:{0}:ready")


@pytest.mark.parametrize("retention", [timedelta(days=1), timedelta(days=2)])
async def test_a_retention_shorter_than_the_stored_window_is_refused(
    world: World, retention: timedelta
) -> None:
    settings = world.settings.model_copy(update={"retention": retention})
    with pytest.raises(ConfigurationError, match="OUTBOX_RETENTION: must be 0 or at least"):
        values(world, rate_window=timedelta(days=3)).apply_to(settings)
