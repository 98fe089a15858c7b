"""What the errors of Redis' driver say about the store."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
from redis._parsers import BaseParser
from redis.exceptions import ConnectionError as RedisConnectionError

from outbox_server.shared.store_trouble import ShardsFailedError, refusal_of, trouble_of


def error_of(reply: str) -> Exception:
    """Return the error that redis-py makes of a reply."""
    parse: Any = BaseParser.parse_error
    error: Exception = parse(reply)
    return error


@pytest.mark.parametrize(
    ("reply", "word", "kind"),
    [
        ("READONLY You can't write against a read only replica.", "READONLY", "read-only replica"),
        # Of a script on Redis 6.2.
        (
            "ERR Error running script: @user_script: 1: -READONLY You can't write here.",
            "READONLY",
            "read-only replica",
        ),
        ("OOM command not allowed when used memory > 'maxmemory'.", "OOM", "out of memory"),
        ("MOVED 3999 127.0.0.1:6381", "MOVED", "slot is on another node"),
        ("ASK 3999 127.0.0.1:6381", "ASK", "slot is being moved"),
        ("TRYAGAIN Multiple keys request during rehashing of slot", "TRYAGAIN", None),
        ("CLUSTERDOWN Hash slot not served", "CLUSTERDOWN", "cluster is down"),
        ("MASTERDOWN Link with MASTER is down", "MASTERDOWN", "read-only replica"),
        ("LOADING Redis is loading the dataset in memory", "LOADING", "starting or stopping"),
        ("MISCONF Redis is configured to save RDB snapshots", "MISCONF", "refuses writes"),
        ("NOREPLICAS Not enough good replicas to write.", "NOREPLICAS", "refuses writes"),
        ("WRONGPASS invalid username-password pair", "WRONGPASS", "login refused"),
        (
            "ERR Script attempted to access a non local key in a cluster node script: 1, on @u:2.",
            None,
            "slot is being moved",
        ),
        (
            "ERR ACL failure in script: User app has no permissions to run the 'info' command",
            None,
            "permission denied",
        ),
        (
            "ERR Error running script: 19: The user executing the script can't run this command",
            None,
            "permission denied",
        ),
        ("ERR Unknown Redis command called from script", None, "command disabled"),
        ("ERR Unknown command called from script script: on @u:4.", None, "command disabled"),
        ("ERR unknown command 'EVALSHA', with args beginning with:", None, "command disabled"),
        ("WRONGTYPE Operation against a key", None, "failed"),
    ],
)
def test_a_reply_of_redis_is_named(reply: str, word: str | None, kind: str | None) -> None:
    error = error_of(reply)
    assert refusal_of(error) == word
    assert trouble_of(error).kind == (kind or "slot is being moved")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ('FATAL:  password authentication failed for user "app"', "login refused"),
        ('FATAL:  role "app" is not permitted to log in', "login refused"),
        ('FATAL:  too many connections for role "app"', "out of resources"),
        ("FATAL:  sorry, too many clients already", "out of resources"),
        ('FATAL:  database "mail" does not exist', "database missing"),
        ("FATAL:  the database system is starting up", "starting or stopping"),
        ("Connection refused", "unreachable"),
    ],
)
def test_a_refused_connection_to_postgresql_is_named(text: str, kind: str) -> None:
    error = psycopg.OperationalError(f'connection failed: connection to server at "h", {text}')
    assert trouble_of(error).kind == kind


def test_a_server_that_does_not_answer_refuses_nothing() -> None:
    error = RedisConnectionError("Error 111 connecting to 127.0.0.1:1. Connection refused.")
    assert refusal_of(error) is None
    assert trouble_of(error).kind == "unreachable"
    assert refusal_of(OSError("READONLY")) is None


def test_the_shards_that_fail_are_named() -> None:
    cause = error_of("CLUSTERDOWN Hash slot not served")
    found = trouble_of(ShardsFailedError(cause, [0, 3], 4))
    assert found.kind == "cluster is down (shards 0, 3 of 4)"
    assert "Hash slot not served" in found.text
