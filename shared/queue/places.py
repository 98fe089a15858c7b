"""Finds the server of a client."""

from __future__ import annotations

from typing import Any, Final, Protocol

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import RedisError

Address = tuple[str, int]
# The errors of a call by one of redis-py's own connections. RuntimeError is uvloop's, if the
# connection was reset before the call.
ASK_ERRORS: Final = (RedisError, OSError, RuntimeError)


class Place(Protocol):
    """Finds the server of a client, for each new connection."""

    async def find(self) -> Address:
        """Return the address of the server.

        Raises:
            redis.exceptions.RedisError: it is not known.
        """

    def doubt(self, address: Address) -> None:
        """Note that the server at this address cannot be reached, or does not serve."""

    def moved(self, address: Address) -> None:
        """Note the address of the server that has taken over, as the former one named it."""

    async def aclose(self) -> None:
        """Close what it uses itself."""


class ConnectionSource(Protocol):
    """Makes connections to a client's server, and knows when to leave it."""

    connection_kwargs: dict[str, Any]
    place: Place | None
    # How often the server was left.
    departures: int

    def make_connection(self) -> AbstractConnection:
        """Return a connection that is not open yet."""

    async def ensure_connection(self, connection: AbstractConnection) -> None:
        """Connect.

        Raises:
            redis.exceptions.RedisError, OSError: the server cannot be found or reached.
        """

    def judge(self, error: RedisError, address: Address | None) -> bool:
        """Note an error of the server at this address. Returns whether to leave the server.

        `address` is None without a `place`.
        """
