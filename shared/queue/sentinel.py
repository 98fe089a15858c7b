"""The URL of a Redis that Sentinel watches: `redis+sentinel://host:26379,host2:26379/name/0`.

Sentinel names the primary, and after a failover the new one. Each new connection asks for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from redis.asyncio.sentinel import MasterNotFoundError, Sentinel

from outbox_server.shared.queue.following import FollowingClient, FollowingPool
from outbox_server.shared.queue.host_urls import malformed, parse_hosts_url
from outbox_server.shared.queue.places import ASK_ERRORS, Address

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
        # Addresses that sentinels named, and that could not be reached or did not serve.
        self._doubted: set[Address] = set()

    async def find(self) -> Address:
        """Return the address of the primary, asked for each time, so that it is never outdated.

        A sentinel that is cut off from the others may go on naming a former primary. So an address
        that was doubted is used only if no sentinel names another one.
        """
        sentinels = self._manager.sentinels
        found: list[Address] = []
        failures: list[str] = []
        for sentinel in tuple(sentinels):
            try:
                masters: Any = await sentinel.sentinel_masters()
            except ASK_ERRORS as error:
                failures.append(str(error))
                continue
            state = masters.get(self._name)
            if state and self._manager.check_master_state(state, self._name):
                found.append((str(state["ip"]), int(state["port"])))
                if found[-1] not in self._doubted:
                    # This sentinel is asked first the next time.
                    sentinels.remove(sentinel)
                    sentinels.insert(0, sentinel)
                    return found[-1]
        self._doubted.clear()
        if not found:
            causes = "".join(f"; {failure}" for failure in failures)
            raise MasterNotFoundError(f"no sentinel knows a primary {self._name!r}{causes}")
        return found[0]

    def doubt(self, address: Address) -> None:
        """Let the other sentinels be asked, too."""
        self._doubted.add(address)

    def moved(self, address: Address) -> None:
        """Do nothing: a server that Sentinel watches does not belong to a cluster."""

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
    # A sentinel replies at once, even to a client that waits for messages.
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
