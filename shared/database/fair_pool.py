"""A pool whose connections are shared fairly between the users whose calls want one.

Without it, the slow statements of one user's calls would take every connection, and all other calls
would wait behind that user's.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, ClassVar, Final

from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import AsyncAdaptedQueuePool, ConnectionPoolEntry, PoolProxiedConnection
from sqlalchemy.util import await_only

from outbox_server.shared.callers import current_claimant
from outbox_server.shared.errors import ResourceExhausted
from outbox_server.shared.fair_shares import Claimant, FairShares

# The maximum number of calls that wait. It is never reached, because other modules allow fewer
# calls.
_WAITING: Final = 10_000


class FairPool(AsyncAdaptedQueuePool):
    """The pool of one process. Work outside of calls may take every connection."""

    # SQLAlchemy derives the logger from the module of a subclass, and silences only its own ones.
    _sqla_logger_namespace: ClassVar[str] = "sqlalchemy.pool.FairPool"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._shares = FairShares(
            "database connections",
            self.size(),
            waiting=_WAITING,
            patience=timedelta(seconds=self.timeout()),
        )
        # The claimant of each connection in use.
        self._holders: dict[ConnectionPoolEntry, Claimant] = {}

    def connect(self) -> PoolProxiedConnection:
        """Return a connection, after waiting for the share of the current call's user.

        Raises:
            sqlalchemy.exc.TimeoutError: it took longer than the pool's time limit.
        """
        claimant = current_claimant()
        if not self._shares.try_take(claimant):
            try:
                await_only(self._shares.take(claimant))
            except ResourceExhausted as error:
                raise PoolTimeoutError(error.message) from None
        try:
            connection = super().connect()
            # An attribute of SQLAlchemy's proxy class, the only class that a pool returns.
            record: ConnectionPoolEntry = connection._connection_record  # noqa: SLF001
        except BaseException:
            self._shares.give_back(claimant)
            raise
        self._holders[record] = claimant
        return connection

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        try:
            super()._do_return_conn(record)
        finally:
            # A record whose check-out failed has no holder.
            claimant = self._holders.pop(record, None)
            if claimant is not None:
                self._shares.give_back(claimant)
