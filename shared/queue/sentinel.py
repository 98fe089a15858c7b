"""The URL of a Redis that Sentinel watches: `redis+sentinel://host:26379,host2:26379/name/0`.

Sentinel names the primary, and after a failover the new one. Each new connection asks for it; a
connection to a former primary ends with its first refused write.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import parse_qsl, unquote

from redis.asyncio import Redis
from redis.asyncio.sentinel import Sentinel

from outbox_server.shared.errors import ConfigurationError

SCHEMES: Final = ("redis+sentinel://", "rediss+sentinel://")
_FORM: Final = "redis+sentinel://[user:password@]host:26379[,host:26379...]/name[/database]"
_PORT: Final = 26_379
_LAST_PORT: Final = 65_535
_MAX_HOSTS: Final = 20
_URL: Final = re.compile(
    r"(?P<scheme>rediss?)\+sentinel://(?P<place>[^/?]*)(?P<path>/[^?]*)(?:\?(?P<query>.*))?"
)
_HOST: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(\d{1,5}))?")
_PATH: Final = re.compile(r"/([A-Za-z0-9._-]{1,200})(?:/(\d{1,5}))?")
_OPTIONS: Final = frozenset(("ssl_ca_certs", "sentinel_username", "sentinel_password"))


@dataclass(frozen=True, slots=True)
class SentinelUrl:
    """The parts of such a URL. `options` are the arguments of connections to Redis servers."""

    hosts: tuple[tuple[str, int], ...]
    name: str
    options: Mapping[str, Any]
    sentinel_options: Mapping[str, Any]


class PrimaryClient(Redis):
    """A client of the primary; it owns the connections to the sentinels."""

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        """Close all connections."""
        await super().aclose(close_connection_pool)
        manager: Sentinel = self.connection_pool.sentinel_manager  # type: ignore[attr-defined]
        await manager.aclose()


def connect_by_sentinel(url: str, options: Mapping[str, Any]) -> Redis:
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
    client: Redis = manager.master_for(
        found.name, redis_class=PrimaryClient, **{**options, **found.options}
    )
    return client


def parse_sentinel_url(url: str) -> SentinelUrl:
    """Return the parts of the URL.

    Raises:
        ConfigurationError: it is malformed; the text does not contain it, as it has a password.
    """
    # Not urlsplit, which takes several hosts with an IPv6 address among them for one.
    parts = _URL.fullmatch(url)
    path = _PATH.fullmatch(parts["path"]) if parts else None
    if parts is None or path is None:
        raise _malformed("the path must be the name that Sentinel knows, and a database")
    options: dict[str, Any] = {"db": int(path[2] or 0)}
    login, _, hosts = parts["place"].rpartition("@")
    user, _, password = login.partition(":")
    if user:
        options["username"] = unquote(user)
    if password:
        options["password"] = unquote(password)
    given = dict(parse_qsl(parts["query"] or "", keep_blank_values=True))
    if unknown := given.keys() - _OPTIONS:
        raise _malformed(f"unknown parameter {min(unknown)!r}")
    sentinel_options: dict[str, Any] = {
        name.removeprefix("sentinel_"): value
        for name, value in given.items()
        if name.startswith("sentinel_")
    }
    if parts["scheme"] == "rediss":
        tls: dict[str, Any] = {"ssl": True}
        if "ssl_ca_certs" in given:
            tls["ssl_ca_certs"] = given["ssl_ca_certs"]
        options |= tls
        sentinel_options |= tls
    elif "ssl_ca_certs" in given:
        raise _malformed("ssl_ca_certs needs the scheme rediss+sentinel")
    return SentinelUrl(_hosts(hosts), path[1], options, sentinel_options)


def _hosts(text: str) -> tuple[tuple[str, int], ...]:
    found = [_HOST.fullmatch(one) for one in text.split(",")[: _MAX_HOSTS + 1]]
    if len(found) > _MAX_HOSTS:
        raise _malformed(f"at most {_MAX_HOSTS} hosts")
    hosts = []
    for host in found:
        port = int(host[2] or _PORT) if host else 0
        if host is None or not 0 < port <= _LAST_PORT:
            raise _malformed("the hosts must be host:port, with commas between them")
        hosts.append((host[1].strip("[]"), port))
    return tuple(hosts)


def _malformed(what: str) -> ConfigurationError:
    return ConfigurationError(f"OUTBOX_REDIS_URL: {what}; write {_FORM}")
