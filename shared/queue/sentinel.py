"""The URL of a Redis that Sentinel watches: `redis+sentinel://host:26379,host2:26379/name/0`.

Sentinel names the primary, and after a failover the new one. Each new connection asks for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from redis.asyncio.sentinel import Sentinel

from outbox_server.shared.queue.following import FollowingClient, FollowingPool
from outbox_server.shared.queue.host_urls import malformed, parse_hosts_url
from outbox_server.shared.queue.places import Address

SCHEMES: Final = ("redis+sentinel://", "rediss+sentinel://")
_FORM: Final = "redis+sentinel://[user:password@]host:26379[,host:26379...]/name[/database]"
_PORT: Final = 26_379
_PATH: Final = re.compile(r"/([A-Za-z0-9._-]{1,200})(?:/(\d{1,5}))?")
_PARAMETERS: Final = frozenset(("sentinel_username", "sentinel_password"))


@dataclass(frozen=True, slots=True)
class SentinelUrl:
    """The parts of such a URL. `options` are the arguments of connections to Redis servers."""

    hosts: tuple[tuple[str, int], ...]
    name: str
    options: Mapping[str, Any] = field(repr=False)
    sentinel_options: Mapping[str, Any] = field(repr=False)


class PrimaryPlace:
    """Asks the sentinels for the primary; it owns the connections to them."""

    def __init__(self, manager: Sentinel, name: str) -> None:
        self._manager = manager
        self._name = name

    async def find(self) -> Address:
        """Return the address of the primary. It is asked for each time, so it is never outdated."""
        host, port = await self._manager.discover_master(self._name)
        return str(host), int(port)

    def doubt(self, address: Address) -> None:
        """Do nothing: see `find`."""

    def moved(self, address: Address) -> None:
        """Do nothing: a server that Sentinel watches is no part of a cluster."""

    async def aclose(self) -> None:
        """Close the connections to the sentinels."""
        await self._manager.aclose()


def connect_by_sentinel(url: str, options: Mapping[str, Any]) -> FollowingClient:
    """Return a client of the primary; `options` are the arguments of each of its connections.

    Raises:
        ConfigurationError: the URL is malformed.
    """
    found = parse_sentinel_url(url)
    kept = ("socket_connect_timeout", "socket_keepalive", "socket_keepalive_options", "retry")
    limits = {name: options[name] for name in kept}
    # A sentinel replies at once, also to a client that waits for messages.
    limits["socket_timeout"] = options["socket_connect_timeout"]
    manager = Sentinel(  # type: ignore[no-untyped-call]
        found.hosts, sentinel_kwargs={**limits, **found.sentinel_options}
    )
    place = PrimaryPlace(manager, found.name)
    return FollowingClient(FollowingPool(place=place, **{**options, **found.options}))


def parse_sentinel_url(url: str) -> SentinelUrl:
    """Return the parts of the URL.

    Raises:
        ConfigurationError: it is malformed; the text does not contain it, as it has a password.
    """
    found = parse_hosts_url(url, _FORM, _PORT, _PARAMETERS)
    path = _PATH.fullmatch(found.path)
    if path is None:
        raise malformed("the path must be the name that Sentinel knows, and a database", _FORM)
    login = {name.removeprefix("sentinel_"): value for name, value in found.parameters.items()}
    return SentinelUrl(
        found.hosts,
        path[1],
        {"db": int(path[2] or 0), **found.login, **found.tls},
        {**login, **found.tls},
    )
