"""A dialect of SQLAlchemy whose engines share the SQL that they compile from statements.

A process compiles each of its statements once. Here every test has new engines, so compiling the
same statements again would take a third of a test's CPU.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import URL
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg, PGDialectAsync_psycopg
from sqlalchemy.engine import Engine
from sqlalchemy.util import LRUCache

_COMPILED: LRUCache[Any, Any] = LRUCache(2_000)


class SharingDialect(PGDialectAsync_psycopg):
    """Equals the dialect of every other engine, since the dialect is part of a cache's key."""

    # SQLAlchemy reads it from each class.
    supports_statement_cache = True

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))

    @classmethod
    def engine_created(cls, engine: Engine) -> None:
        engine.update_execution_options(compiled_cache=_COMPILED)


class SharingEntry(PGDialect_psycopg):
    """The name of the driver: engines without asyncio, of migrations, share nothing."""

    supports_statement_cache = True

    @classmethod
    def get_async_dialect_cls(cls, _url: URL) -> type[SharingDialect]:
        return SharingDialect


def share_statements() -> None:
    """Let all later engines of this process share what they compile."""
    registry.register("postgresql.psycopg", __name__, SharingEntry.__name__)
