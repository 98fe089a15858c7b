"""No statement of a call runs before the call is bound to its user."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextvars import copy_context
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.shared.callers import Caller, CallerKind, set_current_caller
from outbox_server.shared.database.engine import create_engine
from outbox_server.shared.database.models import Sender
from outbox_server.shared.database.ownership import owned_by, owner_of
from outbox_server.shared.settings import load_settings

ANN = Caller("ann", CallerKind.USER)
BACKEND = Caller(None, CallerKind.SERVICE)


@pytest.fixture
async def engine(database_url: str) -> AsyncIterator[AsyncEngine]:
    engine = create_engine(load_settings(database_url=database_url))
    yield engine
    await engine.dispose()


async def call(caller: Caller, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Run `work` as the method of a call."""

    async def method() -> Any:
        set_current_caller(caller)
        return await work()

    return await asyncio.create_task(method(), context=copy_context())


async def run(engine: AsyncEngine, statement: Any) -> list[Any]:
    async with engine.connect() as connection:
        return list(await connection.execute(statement))


@pytest.mark.parametrize("caller", [ANN, BACKEND, Caller(None, CallerKind.LOCAL)])
async def test_a_method_that_forgets_its_user_reads_nothing(
    engine: AsyncEngine, caller: Caller
) -> None:
    with pytest.raises(AssertionError, match="owned_by"):
        await call(caller, lambda: run(engine, select(Sender.id)))


async def test_a_call_bound_to_a_user_reads_only_that_users_rows(engine: AsyncEngine) -> None:
    async def method() -> None:
        bound = owned_by(select(Sender.id), Sender.user_id, "ann")
        assert "user_id" in str(bound)
        assert await run(engine, bound) == []
        assert await run(engine, select(Sender.id)) == []

    await call(ANN, method)


@pytest.mark.parametrize("user_id", ["bob", None])
async def test_a_users_call_cannot_be_bound_to_others(user_id: str | None) -> None:
    async def read() -> None:
        owned_by(select(Sender.id), Sender.user_id, user_id)

    with pytest.raises(AssertionError, match="another user"):
        await call(ANN, read)

    async def write() -> None:
        owner_of("bob")

    with pytest.raises(AssertionError, match="another user"):
        await call(ANN, write)


async def test_a_backend_may_act_for_any_user(engine: AsyncEngine) -> None:
    async def method() -> None:
        for user_id in ("ann", "bob", None):
            assert await run(engine, owned_by(select(Sender.id), Sender.user_id, user_id)) == []

    await call(BACKEND, method)


async def test_queries_outside_of_a_call_need_no_user(engine: AsyncEngine) -> None:
    assert await run(engine, select(Sender.id)) == []
