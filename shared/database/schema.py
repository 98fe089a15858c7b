"""Decides whether this release can run on the schema of the database.

Every migration has a number. A release runs on the schema that it brings and on later ones, until a
contract step removes something that it uses. `outbox migrate` records that in the database.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog
from psycopg.errors import UndefinedTable
from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.shared.database.serving import check_serving, check_writable
from outbox_server.shared.errors import ConfigurationError, FailedPrecondition
from outbox_server.shared.loops import as_coroutine

# How often a check asks for all that this release uses. While that fails, each check does.
_WHOLE_EVERY_S: Final = 5.0
_VERSIONS: Final = Path(__file__).parent / "migrations" / "versions"
# The number of the last migration of this release.
REVISION: Final = max(path.name.partition("_")[0] for path in _VERSIONS.glob("[0-9]*.py"))
# The row is read as JSON, because the second column is missing before `outbox migrate` adds it.
_READ: Final = text("SELECT to_jsonb(alembic_version) FROM alembic_version")


class SchemaOlderError(FailedPrecondition):
    """The schema lacks migrations of this release: the service waits for `outbox migrate`."""

    default_reason = "SCHEMA_OLDER"


@dataclass(frozen=True, slots=True)
class SchemaRevision:
    """The revision of a database; "" before the first migration."""

    revision: str
    # The oldest revision of code that can run on it. None means any.
    oldest_revision: str | None = None

    def check(self, code: str = REVISION) -> None:
        """Check that code of this revision can run on the schema.

        Raises:
            SchemaOlderError: the schema is older than the code.
            ConfigurationError: the schema is newer, and no longer has what the code uses.
        """
        if self.revision < code:
            now = f"is at revision {self.revision}" if self.revision else "does not exist"
            raise SchemaOlderError(
                f"the schema of the database {now}, and this release needs {code}: "
                "run `outbox migrate`"
            )
        if self.oldest_revision is not None and code < self.oldest_revision:
            raise ConfigurationError(
                f"OUTBOX_DATABASE_URL: the schema is at revision {self.revision}, which only "
                f"releases with revision {self.oldest_revision} or later can use; this release "
                f"has {code}: run a newer release"
            )


async def read_revision(engine: AsyncEngine) -> SchemaRevision:
    """Return the revision of the schema.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: PostgreSQL cannot be reached.
    """
    try:
        async with engine.connect() as connection:
            row = await connection.scalar(_READ)
    except ProgrammingError as error:
        if isinstance(error.orig, UndefinedTable):
            return SchemaRevision("")
        raise
    found = row or {}
    return SchemaRevision(found.get("version_num", ""), found.get("oldest_revision"))


class SchemaGuard:
    """Lets a service work once the schema is usable. Health depends on `check`."""

    def __init__(self, engine: AsyncEngine, code: str = REVISION) -> None:
        self._engine = engine
        self._decided = asyncio.Event()
        self._refusal: ConfigurationError | None = None
        self._logged = ""
        # When the next whole check is due, by the monotonic clock.
        self._whole_at = 0.0
        self.code = code
        # The last revision that was read; "" before.
        self.revision = ""

    async def check(self) -> None:
        """Check that this release can run on the schema, and that PostgreSQL serves it.

        All tables and columns are checked every 5 s, and by each call while one is missing.

        Raises:
            SchemaOlderError, ConfigurationError: it cannot. The cause is logged once.
            sqlalchemy.exc.SQLAlchemyError: PostgreSQL cannot be reached, is read-only, or lacks a
                column.
        """
        found = await read_revision(self._engine)
        self.revision = found.revision
        try:
            found.check(self.code)
        except (SchemaOlderError, ConfigurationError) as error:
            if isinstance(error, ConfigurationError) and not self._decided.is_set():
                self._refusal = error
                self._decided.set()
            if str(error) != self._logged:
                structlog.get_logger("outbox.schema").error("schema", error=str(error))
                self._logged = str(error)
            raise
        self._logged = ""
        self._decided.set()
        if time.monotonic() < self._whole_at:
            await check_writable(self._engine)
            return
        await check_serving(self._engine)
        self._whole_at = time.monotonic() + _WHOLE_EVERY_S

    async def run_when_usable(
        self, work: Sequence[Callable[[], Awaitable[None]]], stop: asyncio.Event
    ) -> None:
        """Run `work` as soon as a `check` has succeeded. Do nothing if `stop` is set before.

        Raises:
            ConfigurationError: the first schema that was seen is too new for this release.
        """
        waits = [asyncio.ensure_future(event.wait()) for event in (self._decided, stop)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if self._refusal is not None:
            raise self._refusal
        if stop.is_set():
            return
        async with asyncio.TaskGroup() as group:
            for part in work:
                group.create_task(as_coroutine(part))
