"""Markers that request a load, and the ids of rows that no caller sees."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from sqlalchemy import select

from outbox_server.services.scheduler.storage.oauth2_credentials import replace_credentials
from outbox_server.shared.database.models import EmailJob
from outbox_server.shared.heads.markers import mark_stale, marking_stale
from outbox_server.shared.settings import load_settings
from tests.world import World


@pytest_asyncio.fixture
async def world(database_url: str, redis_url: str) -> AsyncIterator[World]:
    async with World(load_settings(database_url=database_url, redis_url=redis_url)) as world:
        yield world


async def test_one_marker_is_written_per_sender_of_many_moved_jobs(world: World) -> None:
    senders = [await world.sender() for _ in range(2)]
    for sender in senders:
        await world.schedule(sender, 3)
    await world.sql("DELETE FROM head_markers")
    moved = select(EmailJob.sender_id).cte("moved")
    async with world.engine.begin() as connection:
        await connection.execute(select(moved.c.sender_id).add_cte(marking_stale(moved)))
    markers = await world.sql("SELECT sender_id FROM head_markers ORDER BY sender_id")
    assert [marker.sender_id for marker in markers] == senders


@pytest.mark.parametrize("table", ["head_markers", "oauth2_credentials"])
async def test_an_id_is_not_used_again_after_its_sequence_stepped_back(
    world: World, table: str
) -> None:
    """A replica that takes over without the last commits has a lower sequence."""
    sender = await world.sender()
    secrets = {"token_url": "https://x.test/token", "client_id": "c", "scope": ""}
    found = []
    for _ in range(3):
        await world.sql(f"DELETE FROM {table}")
        await world.sql(f"SELECT setval('{table}_id_seq', 7)")
        async with world.engine.begin() as connection:
            if table == "head_markers":
                await mark_stale(connection, [sender, sender])
            else:
                await replace_credentials(connection, sender, secrets)
        found += [row.id for row in await world.sql(f"SELECT id FROM {table} ORDER BY id")]
    assert found == sorted(set(found))
    assert len(found) == (6 if table == "head_markers" else 3)
