"""Checks the parameters of OUTBOX_REDIS_URL, without a connection."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qsl

from outbox_server.shared.errors import ConfigurationError
from outbox_server.shared.store_urls import check_named_files

_VARIABLE: Final = "OUTBOX_REDIS_URL"


@dataclass(frozen=True, slots=True)
class _Values:
    """The values of a parameter: their pattern, and the same in words."""

    pattern: re.Pattern[str]
    words: str


_NUMBER: Final = re.compile(r"\d{1,9}")
# The words that redis-py knows. It takes any other text for "yes".
_SWITCH: Final = _Values(re.compile(r"(?i:0|f|false|n|no|1|t|true|y|yes)"), "yes or no")
_SECONDS: Final = _Values(
    re.compile(r"0{0,9}[1-9]\d{0,8}(\.\d{1,9})?|0?\.\d{0,8}[1-9]0{0,9}"), "a number of seconds"
)
_TEXT: Final = _Values(re.compile(r".+"), "a text that is not empty")
_FLAGS: Final = _Values(
    re.compile(r"VERIFY_[A-Z0-9_]+(,VERIFY_[A-Z0-9_]+)*"), "names of ssl.VerifyFlags"
)
# The parameters besides those of TLS. They change nothing of what a call returns. Nothing is
# retried, whatever `retry_on_timeout` says.
_PARAMETERS: Final[Mapping[str, _Values]] = {
    "client_name": _Values(re.compile(r"[!-~]{1,200}"), "a text without spaces"),
    "db": _Values(_NUMBER, "the number of a database"),
    "health_check_interval": _Values(_NUMBER, "a whole number of seconds"),
    "password": _TEXT,
    "protocol": _Values(re.compile(r"[23]"), "2 or 3"),
    "retry_on_timeout": _SWITCH,
    "socket_connect_timeout": _SECONDS,
    "socket_keepalive": _SWITCH,
    "socket_read_size": _Values(re.compile(r"[1-9]\d{0,8}"), "a whole number of bytes"),
    "socket_timeout": _SECONDS,
    "username": _TEXT,
}
_OF_TLS: Final[Mapping[str, _Values]] = {
    "ssl_ca_certs": _TEXT,
    "ssl_ca_data": _TEXT,
    "ssl_ca_path": _TEXT,
    "ssl_cert_reqs": _Values(re.compile(r"none|optional|required"), "none, optional or required"),
    "ssl_certfile": _TEXT,
    "ssl_check_hostname": _SWITCH,
    "ssl_ciphers": _TEXT,
    "ssl_exclude_verify_flags": _FLAGS,
    "ssl_include_verify_flags": _FLAGS,
    "ssl_keyfile": _TEXT,
    "ssl_min_version": _Values(re.compile(r"771|772"), "771 (TLS 1.2) or 772 (TLS 1.3)"),
    "ssl_password": _TEXT,
}
_FILES: Final = ("ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile")
_TLS_SCHEME: Final = "rediss"


def check_files(url: str) -> None:
    """Check that the files exist that a URL of Redis, Sentinel or a cluster names.

    Raises:
        ConfigurationError: one does not.
    """
    given = dict(parse_qsl(url.partition("?")[2]))
    try:
        check_named_files(given, _FILES)
    except ValueError as error:
        raise ConfigurationError(f"{_VARIABLE}: {error}") from None


def check_parameters(url: str) -> None:
    """Check the parameters of the URL of one server.

    Parameters that are not known here would change how the client works, or do not exist.

    Raises:
        ConfigurationError: one cannot be used; the text says which, and what it takes.
    """
    scheme = url.partition("://")[0]
    known = {**_PARAMETERS, **_OF_TLS} if scheme == _TLS_SCHEME else _PARAMETERS
    for name, value in parse_qsl(url.partition("?")[2], keep_blank_values=True):
        if name in known:
            if not known[name].pattern.fullmatch(value):
                raise ConfigurationError(f"{_VARIABLE}: {name} must be {known[name].words}")
        elif name in _OF_TLS:
            raise ConfigurationError(f"{_VARIABLE}: {name} needs the scheme {_TLS_SCHEME}")
        else:
            raise ConfigurationError(
                f"{_VARIABLE}: unknown parameter {name[:50]!r}; known are {', '.join(known)}"
            )
