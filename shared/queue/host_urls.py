"""URLs of Redis with several hosts: `redis+cluster://` and `redis+sentinel://`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import parse_qsl, unquote

from outbox_server.shared.errors import ConfigurationError

_LAST_PORT: Final = 65_535
_MAX_HOSTS: Final = 20
_URL: Final = re.compile(
    r"(?P<scheme>rediss?)\+[a-z]+://(?P<place>[^/?]*)(?P<path>(?:/[^?]*)?)(?:\?(?P<query>.*))?"
)
_HOST: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(\d{1,5}))?")
_CA: Final = "ssl_ca_certs"


@dataclass(frozen=True, slots=True)
class HostsUrl:
    """The parts of such a URL. `login` and `tls` are arguments of connections.

    `form` shows a well-formed URL, for errors.
    """

    form: str
    hosts: tuple[tuple[str, int], ...]
    path: str
    login: Mapping[str, Any] = field(repr=False)
    tls: Mapping[str, Any]
    # The parameters, without those of TLS.
    parameters: Mapping[str, str] = field(repr=False)


def parse_hosts_url(url: str, form: str, port: int, parameters: frozenset[str]) -> HostsUrl:
    """Return the parts of a URL. `port` is the default, `parameters` the names that it may have.

    Raises:
        ConfigurationError: it is malformed; the text does not contain it, as it has a password.
    """
    # urlsplit would take several hosts, one of them with an IPv6 address, for one host.
    parts = _URL.fullmatch(url)
    if parts is None:
        raise malformed("the URL is malformed", form)
    login, _, hosts = parts["place"].rpartition("@")
    user, _, password = login.partition(":")
    credentials = {"username": unquote(user), "password": unquote(password)}
    given = dict(parse_qsl(parts["query"] or "", keep_blank_values=True))
    if unknown := given.keys() - parameters - {_CA}:
        raise malformed(f"unknown parameter {min(unknown)!r}", form)
    tls: dict[str, Any] = {}
    ca = given.pop(_CA, None)
    if parts["scheme"] == "rediss":
        tls = {"ssl": True} if ca is None else {"ssl": True, _CA: ca}
    elif ca is not None:
        secure = "rediss" + form.partition(":")[0].removeprefix("redis")
        raise malformed(f"{_CA} needs the scheme {secure}", form)
    return HostsUrl(
        form=form,
        hosts=_hosts(hosts, port, form),
        path=parts["path"],
        login={name: value for name, value in credentials.items() if value},
        tls=tls,
        parameters=given,
    )


def _hosts(text: str, default: int, form: str) -> tuple[tuple[str, int], ...]:
    found = [_HOST.fullmatch(one) for one in text.split(",")[: _MAX_HOSTS + 1]]
    if len(found) > _MAX_HOSTS:
        raise malformed(f"at most {_MAX_HOSTS} hosts", form)
    hosts = []
    for host in found:
        port = int(host[2] or default) if host else 0
        if host is None or not 0 < port <= _LAST_PORT:
            raise malformed("the hosts must be host:port, with commas between them", form)
        hosts.append((host[1].strip("[]"), port))
    return tuple(hosts)


def malformed(what: str, form: str) -> ConfigurationError:
    """Return the error of a malformed OUTBOX_REDIS_URL."""
    return ConfigurationError(f"OUTBOX_REDIS_URL: {what}; write {form}")
