"""Checks the form of the URLs of both stores without their drivers, and shows them without secrets.

No text of this module contains a part of a URL that may be a secret.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

_PARTS: Final = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+]*)://(?:(?P<login>[^/?#]*)@)?(?P<hosts>[^/?#@]*)"
    r"(?P<path>/[^?#]*)?(?:\?(?P<query>[^#]*))?"
)
_HOST: Final = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%]+\]|[^\s:\[\]]*)(?::(?P<port>[^\s:]*))?")
_HIGHEST_PORT: Final = 65_535
_MAX_HOSTS: Final = 20
# "+psycopg" was needed once, to name the driver.
DATABASE_SCHEMES: Final = ("postgresql", "postgres", "postgresql+psycopg")
DATABASE_FORM: Final = "postgresql://user:password@host:port/database"
REDIS_SCHEMES: Final = (
    *("redis", "rediss", "unix"),
    *("redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster"),
)
REDIS_FORM: Final = "redis://user:password@host:port/0"
_ENCODE: Final = "write special characters of user and password as %XX"


def check_database_url(url: str) -> str:
    """Return the URL if it has the form of libpq's URLs.

    Raises:
        ValueError: it does not; the text says what is wrong, without the URL.
    """
    _check(url, DATABASE_SCHEMES, DATABASE_FORM)
    return url


def check_redis_url(url: str) -> str:
    """Return the URL if it has the form of redis-py's URLs, or of one for Sentinel or a cluster.

    Raises:
        ValueError: it does not; the text says what is wrong, without the URL.
    """
    parts = _check(url, REDIS_SCHEMES, REDIS_FORM)
    number = (parts["path"] or "").strip("/")
    if parts["scheme"] in ("redis", "rediss") and number and not number.isdecimal():
        raise ValueError(f"the path must be the number of a database, such as /0: {REDIS_FORM}")
    return url


def check_named_files(parameters: Mapping[str, str], names: Iterable[str]) -> None:
    """Check that the files and folders exist which these parameters name.

    Raises:
        ValueError: one does not; the text has its parameter and its path.
    """
    for name in names:
        path = parameters.get(name)
        if path and not Path(path).exists():
            raise ValueError(f"{name} must be a file that exists (got {path[:200]!r})")


def place_of(url: str) -> str:
    """Return the hosts, ports and the path of a checked URL: no user, password or parameters."""
    parts = _PARTS.fullmatch(url)
    if parts is None:
        return "a malformed URL"
    return f"{parts['hosts']}{parts['path'] or ''}"


def _check(url: str, schemes: tuple[str, ...], form: str) -> re.Match[str]:
    if "://" not in url or url.partition("://")[0] not in schemes:
        raise ValueError(f"is not a URL that begins with {schemes[0]}://; write {form}")
    parts = _PARTS.fullmatch(url)
    if parts is None:
        raise ValueError(f"is malformed ({_ENCODE}); write {form}")
    hosts = parts["hosts"].split(",")
    if len(hosts) > _MAX_HOSTS:
        raise ValueError(f"has more than {_MAX_HOSTS} hosts")
    for host in hosts:
        found = _HOST.fullmatch(host)
        if found is None:
            raise ValueError(f"has a malformed host ({_ENCODE}); write {form}")
        port = found["port"]
        if port and not (port.isdecimal() and 0 < int(port[:6]) <= _HIGHEST_PORT):
            raise ValueError(f"has a port that is not a number from 1 to {_HIGHEST_PORT} ({form})")
    return parts
