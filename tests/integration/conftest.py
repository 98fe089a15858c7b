"""Fixtures that several modules share. A module that needs another one defines it itself."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.services.dispatcher.smtp import SmtpPool
from outbox_server.shared.database.engine import create_engine
from tests.dispatchers import options, settings_of
from tests.smtp_pools import LIMIT, pool_of
from tests.world import World


@pytest_asyncio.fixture
async def world(database_url: str, redis_url: str) -> AsyncIterator[World]:
    """An installation whose relay cannot be reached."""
    async with World(settings_of(options(database_url, redis_url, "smtp://127.0.0.1:1"))) as world:
        yield world


@pytest_asyncio.fixture
async def statements(world: World) -> AsyncIterator[AsyncEngine]:
    """A connection like the dispatcher's: every statement is its own transaction."""
    engine = create_engine(world.settings, lookups_only=True, single_statements=True)
    yield engine
    await engine.dispose()


@pytest_asyncio.fixture
async def connection(statements: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    async with statements.connect() as connection:
        yield connection


@pytest_asyncio.fixture
async def pool() -> AsyncIterator[SmtpPool]:
    """A pool that waits for servers for long."""
    pool = pool_of(timeout=30.0)
    yield pool
    await pool.close()


@pytest_asyncio.fixture
async def short_pool() -> AsyncIterator[SmtpPool]:
    """A pool with a short time-out for a silent server."""
    pool = pool_of(timeout=LIMIT)
    yield pool
    await pool.close()
