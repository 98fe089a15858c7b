"""A connection to PostgreSQL that several statements, or several tests, use one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psycopg
from psycopg import sql


class KeptConnection:
    """A connection with autocommit, opened when it is first used, and again after it was lost.

    A new connection costs more than most statements, because its process reads the catalog again.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._connection: psycopg.Connection[Any] | None = None

    def execute(
        self, statement: bytes | sql.Composed, parameters: Sequence[Any] | None = None
    ) -> psycopg.Cursor[Any]:
        """Run a statement in its own transaction."""
        if self._connection is not None:
            try:
                return self._connection.execute(statement, parameters)
            except psycopg.OperationalError:
                if not self._connection.closed:
                    raise
                # A test restarted PostgreSQL, or ended all connections.
                self._connection = None
        # A statement would wait forever for a lock that a server of this process holds, because it
        # blocks the event loop. A lock that the test before left fails with a message.
        self._connection = psycopg.connect(
            self._url, autocommit=True, options="-c lock_timeout=5s", prepare_threshold=None
        )
        return self._connection.execute(statement, parameters)

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
