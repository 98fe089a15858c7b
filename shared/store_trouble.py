"""Describes in a few words why a store does not serve, by the error of its driver.

The words are fixed and contain no host, so the health port may show them to anybody. The driver's
own text goes to the log.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import psycopg
from redis import exceptions as redis_errors
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from outbox_server.shared.errors import ConfigurationError, OutboxError

_MAX_TEXT: Final = 300
UNREACHABLE: Final = "unreachable"
FAILED: Final = "failed"
MOVING: Final = "slot is being moved"

# The keys are beginnings of a SQLSTATE; the longest one that matches counts.
_STATES: Final = {
    "25006": "read-only server",
    "42703": "column missing",
    "42P01": "table missing",
    "42501": "permission denied",
    "28": "login refused",
    "3D000": "database missing",
    "53": "out of resources",
    "55P03": "locked",
    "57014": "too slow",
    "57P": "starting or stopping",
    "08": UNREACHABLE,
}
# The keys are first words of a reply. A script's error may quote the reply further on.
_REPLIES: Final = {
    "OOM": "out of memory",
    "READONLY": "read-only replica",
    "MOVED": "slot is on another node",
    "ASK": MOVING,
    "CLUSTERDOWN": "cluster is down",
    "TRYAGAIN": MOVING,
    "CROSSSLOT": "slot is on another node",
    "MASTERDOWN": "read-only replica",
    "MISCONF": "refuses writes",
    "NOREPLICAS": "refuses writes",
    "LOADING": "starting or stopping",
    "NOPERM": "permission denied",
    "NOAUTH": "login refused",
    "WRONGPASS": "login refused",
}
_REPLY: Final = re.compile(rf"(?:^|-)({'|'.join(_REPLIES)})\b")
# Parts of the errors of connections that PostgreSQL refuses. psycopg has no SQLSTATE for them.
_REFUSED: Final = {
    "authentication failed": "login refused",
    "not permitted to log in": "login refused",
    "no pg_hba.conf entry": "login refused",
    "no password supplied": "login refused",
    "too many connections": "out of resources",
    "too many clients": "out of resources",
    "remaining connection slots": "out of resources",
    "is starting up": "starting or stopping",
    "is shutting down": "starting or stopping",
    "not currently accepting connections": "starting or stopping",
}
_MISSING: Final = re.compile(r'database "[^"]*" does not exist')
# Parts of the errors of scripts, which have no such word; in lower case.
_IN_SCRIPTS: Final = {
    # A key of the script is on another node, as the slot is being moved.
    "non local key": MOVING,
    "acl failure": "permission denied",
    # The text of Redis 6.2.
    "executing the script can't": "permission denied",
    # The server has renamed it.
    "unknown redis command": "command disabled",
    "unknown command": "command disabled",
}
_KINDS: Final[tuple[tuple[type[Exception], str], ...]] = (
    # The server closed the connection after the login.
    (redis_errors.AuthenticationError, "login refused"),
    (PoolTimeoutError, "no connection free"),
    (psycopg.OperationalError, UNREACHABLE),
    (psycopg.InterfaceError, UNREACHABLE),
    (redis_errors.ConnectionError, UNREACHABLE),
    (redis_errors.TimeoutError, UNREACHABLE),
    (OSError, UNREACHABLE),
)


@dataclass(frozen=True, slots=True)
class StoreTrouble:
    """Why a store does not serve: `kind` for anybody, `text` (one line) for the operator."""

    kind: str
    text: str


class ShardsFailedError(redis_errors.RedisError):
    """Some shards of the queue do not serve, and others do."""

    def __init__(self, cause: BaseException, failed: Sequence[int], shards: int) -> None:
        """`cause` is the error of the first shard in `failed`."""
        self.cause = cause
        self.where = f"shards {', '.join(map(str, failed))} of {shards}"
        super().__init__(f"{cause} ({self.where})")


def refusal_of(error: BaseException) -> str | None:
    """Return the first word of a refusal by Redis, such as READONLY; None for another error."""
    if not isinstance(error, redis_errors.RedisError):
        return None
    # For some replies, redis-py keeps the first word only here.
    word = getattr(error, "status_code", None)
    if word in _REPLIES:
        return str(word)
    reply = _REPLY.search(str(error))
    return None if reply is None else reply[1]


def trouble_of(error: BaseException) -> StoreTrouble:
    """Return the trouble of a store by the error of its check."""
    if isinstance(error, ShardsFailedError):
        trouble = trouble_of(error.cause)
        return StoreTrouble(f"{trouble.kind} ({error.where})", trouble.text)
    if isinstance(error, OutboxError):
        return StoreTrouble(_of_ours(error), _one_line(error.message))
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    text = _text(cause) or type(cause).__name__
    return StoreTrouble(_of_driver(cause, text), text)


def _of_ours(error: OutboxError) -> str:
    # The class is not imported here, because it is in the module that runs the checks.
    if error.reason == "SCHEMA_OLDER":
        return "schema older than this release: run `outbox migrate`"
    if error.reason == "LIFE_SUPERSEDED":
        return "another Redis server is in use"
    if error.reason == "SETTINGS_UNKNOWN":
        return "stored settings not read yet"
    if isinstance(error, ConfigurationError):
        return "schema too new for this release"
    return FAILED


def _of_driver(cause: BaseException, text: str) -> str:
    state = cause.sqlstate if isinstance(cause, psycopg.Error) else None
    for length in (5, 3, 2):
        if state and state[:length] in _STATES:
            return _STATES[state[:length]]
    if isinstance(cause, psycopg.OperationalError) and _MISSING.search(text):
        return _STATES["3D000"]
    if (refusal := refusal_of(cause)) is not None:
        return _REPLIES[refusal]
    parts: Mapping[str, str] = {}
    if isinstance(cause, psycopg.OperationalError):
        parts = _REFUSED
    elif isinstance(cause, redis_errors.RedisError):
        parts = _IN_SCRIPTS
    said = (words for part, words in parts.items() if part in text.lower())
    kinds = (words for kind, words in _KINDS if isinstance(cause, kind))
    return next(said, next(kinds, FAILED))


def _text(cause: BaseException) -> str:
    """Return the driver's text. Further lines of a server's error may have the values of a row."""
    if isinstance(cause, psycopg.Error) and cause.sqlstate:
        return _one_line(str(cause).partition("\n")[0])
    return _one_line(str(cause))


def _one_line(text: str) -> str:
    return " ".join(text.split())[:_MAX_TEXT]
