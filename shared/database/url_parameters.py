"""Checks the parameters of OUTBOX_DATABASE_URL, without a connection.

libpq looks at most of them only when it connects, so a wrong one would look like an outage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from psycopg import conninfo, pq

from outbox_server.shared.store_urls import check_named_files

_SWITCH: Final = ("0", "1")
_TLS_VERSIONS: Final = ("TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3")
_WORDS: Final[Mapping[str, tuple[str, ...]]] = {
    "channel_binding": ("disable", "prefer", "require"),
    "gssencmode": ("disable", "prefer", "require"),
    "keepalives": _SWITCH,
    "load_balance_hosts": ("disable", "random"),
    "ssl_max_protocol_version": _TLS_VERSIONS,
    "ssl_min_protocol_version": _TLS_VERSIONS,
    "sslcertmode": ("disable", "allow", "require"),
    "sslcompression": _SWITCH,
    "sslmode": ("disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
    "sslnegotiation": ("postgres", "direct"),
    "sslsni": _SWITCH,
    "target_session_attrs": (
        *("any", "read-write", "read-only", "primary", "standby", "prefer-standby"),
    ),
}
_NUMBERS: Final[Mapping[str, str]] = {
    "connect_timeout": "seconds",
    "keepalives_count": "probes",
    "keepalives_idle": "seconds",
    "keepalives_interval": "seconds",
    "tcp_user_timeout": "milliseconds",
}
# PostgreSQL's names of UTF-8, without hyphens. The driver and our statements rely on it.
_UTF8: Final = ("utf8", "unicode")
_FILES: Final = frozenset(("sslcert", "sslcrl", "sslcrldir", "sslkey", "sslrootcert"))
_MOST: Final = 2_147_483_647
_SECRETS: Final = ("password", "sslpassword", "scram_client_key", "scram_server_key")
# A folder without a socket: libpq checks all parameters, and then finds no server.
_NOWHERE: Final = "/nonexistent"
_FOUND_NONE: Final = "connection to server"


def check_parameters(parameters: Mapping[str, Any]) -> None:
    """Check the parameters of a URL that libpq has parsed.

    Raises:
        ValueError: one cannot be used; the text says which, and what it takes, without secrets.
    """
    for name, words in _WORDS.items():
        value = parameters.get(name)
        if value is not None and value not in words:
            raise ValueError(f"{name} must be one of {', '.join(words)}")
    encoding = str(parameters.get("client_encoding", "UTF8"))
    if encoding.replace("-", "").lower() not in _UTF8:
        raise ValueError("client_encoding must be UTF8")
    for name, unit in _NUMBERS.items():
        value = parameters.get(name)
        if value is not None and not _is_number(value):
            raise ValueError(f"{name} must be a whole number of {unit} (0 to {_MOST})")
    # "system" means the certificates of the operating system.
    system = {"sslrootcert"} if parameters.get("sslrootcert") == "system" else set()
    check_named_files(parameters, _FILES - system)
    _ask_libpq(parameters)


def _is_number(value: str) -> bool:
    short = len(value) <= len(str(_MOST))
    return short and value.isascii() and value.isdecimal() and int(value) <= _MOST


def _ask_libpq(parameters: Mapping[str, Any]) -> None:
    """Let libpq check what remains, such as options that exclude one another."""
    hosts = parameters.get("hostaddr") or parameters.get("host") or ""
    nowhere = ",".join([_NOWHERE] * (hosts.count(",") + 1))
    # Set to empty, so that PGHOSTADDR has no effect.
    given = {**parameters, "host": nowhere, "hostaddr": ""}
    connection = pq.PGconn.connect_start(conninfo.make_conninfo("", **given).encode())
    try:
        text = connection.error_message.decode("utf-8", "replace").strip()
    finally:
        connection.finish()
    if text.startswith(_FOUND_NONE):
        return
    line = text.partition("\n")[0][:200]
    if any(str(given[name]) in line for name in _SECRETS if given.get(name)):
        line = "a parameter has a wrong value"
    raise ValueError(f"libpq refuses its parameters: {line}")
