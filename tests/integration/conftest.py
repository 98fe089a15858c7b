"""Fixtures shared by the tests of the dispatcher's parts."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.shared.database.engine import create_engine
from tests.world import World


@pytest_asyncio.fixture
async def statements(world: World) -> AsyncIterator[AsyncEngine]:
    """A connection like the dispatcher's: every statement is its own transaction."""
    engine = create_engine(world.settings, lookups_only=True, single_statements=True)
    yield engine
    await engine.dispose()
