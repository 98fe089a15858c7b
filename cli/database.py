"""Access to PostgreSQL for the operator's commands, which need no running service."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import psycopg
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.cli.addresses import ENDPOINTS, read_endpoints
from outbox_server.cli.lazy import CommandFailed
from outbox_server.shared.database.engine import create_engine
from outbox_server.shared.settings import load_settings

T = TypeVar("T")


def with_engine(work: Callable[[AsyncEngine], Awaitable[T]], **options: Any) -> T:
    """Run `work` on the database of OUTBOX_DATABASE_URL and return its result.

    If that is not set, it is the database of the `outbox up` that runs in the current folder.
    `options` are passed to `create_engine`.

    Raises:
        CommandFailed: the database cannot be reached, or has no schema.
    """
    settings, origin = load_settings(), "OUTBOX_DATABASE_URL"
    stack = None if "database_url" in settings.model_fields_set else read_endpoints()
    if stack is not None:
        settings, origin = load_settings(database_url=stack["database_url"]), str(ENDPOINTS)

    async def run() -> T:
        engine = create_engine(settings, **options)
        try:
            return await work(engine)
        finally:
            await engine.dispose()

    return run_on(origin, run())


def run_on(origin: str, work: Coroutine[Any, Any, T]) -> T:
    """Run work on the database that `origin` names, and return its result.

    Raises:
        CommandFailed: the database cannot be reached, or has no schema.
    """
    try:
        return asyncio.run(work)
    except SQLAlchemyError as error:
        cause = getattr(error, "orig", None) or error
        text = " ".join(str(cause).split())
        if isinstance(cause, psycopg.errors.UndefinedTable):
            text = f"the schema is not up to date; run `outbox migrate` ({text})"
        raise CommandFailed(f"{origin}: {text}") from None


def in_one_transaction(work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
    """Run `work` in one transaction, commit it, and return its result.

    Raises:
        CommandFailed: the database cannot be reached, or has no schema.
    """

    async def run(engine: AsyncEngine) -> T:
        async with engine.begin() as connection:
            return await work(connection)

    return with_engine(run)
