"""Connections that leave a server which no longer serves, and find the server that replaced it.

A primary may be demoted, or lose its slots, while its connections stay open. It then refuses what
it is asked. After such a reply all connections to it are closed, those in use after their call, and
the next call connects again: to the host of the URL, to the primary that Sentinel names, or to the
node that owns the slot. No call is repeated here.
"""

from __future__ import annotations

import time
import weakref
from typing import Any, Final

import structlog
from redis.asyncio import Redis
from redis.asyncio.connection import (
    AbstractConnection,
    Connection,
    ConnectionPool,
    SSLConnection,
    UnixDomainSocketConnection,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import MovedError, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from outbox_server.shared.queue.places import Address, Place
from outbox_server.shared.queue.script_pipe import ScriptPipe
from outbox_server.shared.store_trouble import refusal_of

# Replies of a server that is the wrong one, or cannot serve now.
_LEFT_AFTER: Final = frozenset(
    ("READONLY", "MASTERDOWN", "MOVED", "CLUSTERDOWN", "OOM", "LOADING", "MISCONF", "NOREPLICAS")
)
# If there is no other server, a server that does not serve is left again and again. The pause
# between two departures doubles from the first value to the last, and starts again after the reset.
_FIRST_PAUSE_S: Final = 1.0
_LONGEST_PAUSE_S: Final = 4.0
_RESET_S: Final = 10.0
_MAX_TEXT: Final = 200
_log = structlog.get_logger(__name__)


class _Following(AbstractConnection):
    """A connection that tells its pool when its server is the wrong one."""

    host: str
    port: int

    def __init__(self, *, following_pool: FollowingPool, **options: Any) -> None:
        self._pool = following_pool
        super().__init__(**options)

    async def connect_check_health(self, *args: Any, **options: Any) -> None:
        """Connect to the server that the place names now."""
        place = self._pool.place
        if place is None or self.is_connected:
            await super().connect_check_health(*args, **options)
            return
        address = await place.find()
        self._pool.found(address)
        self.host, self.port = address
        try:
            await super().connect_check_health(*args, **options)
        except (RedisConnectionError, RedisTimeoutError):
            place.doubt(address)
            raise

    async def send_packed_command(self, *args: Any, **options: Any) -> None:
        """Send a command.

        Raises:
            redis.exceptions.RedisError, OSError: it was not sent.
        """
        try:
            await super().send_packed_command(*args, **options)
        except RuntimeError as error:
            # An error of uvloop that redis-py does not expect: the connection was reset before.
            raise RedisConnectionError(f"the connection to Redis was lost ({error})") from error

    async def read_response(self, *args: Any, **options: Any) -> Any:
        """Return a reply. Leave the server if the reply says that it does not serve."""
        try:
            return await super().read_response(*args, **options)
        except RedisError as error:
            address = None if self._pool.place is None else (self.host, self.port)
            if self._pool.judge(error, address):
                _mark(self)
            raise


class FollowingConnection(_Following, Connection):
    """A connection by TCP."""


class FollowingSSLConnection(_Following, SSLConnection):
    """A connection by TLS."""


class FollowingUnixConnection(_Following, UnixDomainSocketConnection):
    """A connection to a Unix socket."""


_CLASSES: Final[dict[type[AbstractConnection], type[_Following]]] = {
    Connection: FollowingConnection,
    SSLConnection: FollowingSSLConnection,
    UnixDomainSocketConnection: FollowingUnixConnection,
}


class FollowingPool(ConnectionPool):
    """The connections to one server, or to the server that replaced it.

    Without a `place`, the server is always that of the URL.
    """

    def __init__(
        self,
        connection_class: type[AbstractConnection] = Connection,
        *,
        place: Place | None = None,
        **options: Any,
    ) -> None:
        if options.pop("ssl", False):
            connection_class = SSLConnection
        super().__init__(connection_class=_CLASSES[connection_class], **options)
        self.connection_kwargs["following_pool"] = weakref.proxy(self)
        self.place = place
        # How often its server was left.
        self.departures = 0
        self._address: Address | None = None
        self._left_at = float("-inf")
        self._pause = _FIRST_PAUSE_S

    def found(self, address: Address) -> None:
        """Leave the former server if the place names another one now."""
        if self._address not in (None, address):
            self._depart()
        self._address = address

    def doubt(self) -> None:
        """Tell the place that its server may be the wrong one."""
        if self.place is not None and self._address is not None:
            self.place.doubt(self._address)

    def judge(self, error: RedisError, address: Address | None) -> bool:
        """Note an error of the server at this address. Returns whether to leave the server.

        `address` is None without a `place`.
        """
        place = self.place
        if refusal_of(error) in _LEFT_AFTER:
            if place is not None and address is not None:
                if isinstance(error, MovedError):
                    place.moved((error.host or address[0], error.port))
                else:
                    place.doubt(address)
            self.leave(error)
            return True
        is_lost = isinstance(error, RedisConnectionError | RedisTimeoutError)
        if is_lost and place is not None and address is not None:
            place.doubt(address)
        return False

    def leave(self, error: RedisError) -> None:
        """Let the next calls use new connections, unless the server was left a moment ago."""
        now = time.monotonic()
        since = now - self._left_at
        if since < self._pause:
            return
        if since > _RESET_S:
            self._pause = _FIRST_PAUSE_S
            _log.warning("redis_left", error=str(error)[:_MAX_TEXT])
        else:
            self._pause = min(2 * self._pause, _LONGEST_PAUSE_S)
        self._left_at = now
        self._depart()

    def _depart(self) -> None:
        self.departures += 1
        for connection in (*self._get_free_connections(), *self._get_in_use_connections()):
            if connection.is_connected:
                _mark(connection)

    async def ensure_connection(self, connection: AbstractConnection) -> None:
        """Connect, or connect again if the server was left since the last use."""
        marked: Any = connection.should_reconnect
        if marked():
            await connection.disconnect()
        await super().ensure_connection(connection)


class FollowingClient(Redis):
    """A client whose connections follow the server; it owns its pool and the pool's place."""

    def __init__(self, pool: FollowingPool) -> None:
        super().__init__(connection_pool=pool)
        self.auto_close_connection_pool = True
        self._pool = pool
        self.scripts = ScriptPipe(pool)

    async def leave_server(self) -> None:
        """Let the next calls use new connections, which may lead to another server."""
        self._pool.doubt()
        self.scripts.leave()
        await self._pool.disconnect(inuse_connections=False)

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        """Close all connections."""
        await self.scripts.aclose()
        await super().aclose(close_connection_pool)
        if self._pool.place is not None:
            await self._pool.place.aclose()


def _mark(connection: AbstractConnection) -> None:
    """Let a connection be closed after its call; the next call opens it again."""
    mark: Any = connection.mark_for_reconnect
    mark()


def departures_of(redis: Redis) -> int:
    """Return how often a client has left its server, for another one or to connect again."""
    pool = redis.connection_pool
    return pool.departures if isinstance(pool, FollowingPool) else 0
