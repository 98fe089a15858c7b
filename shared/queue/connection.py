"""Connections to Redis: every call has a time limit, and the client retries none by itself."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from outbox_server.shared.errors import ConfigurationError
from outbox_server.shared.queue import cluster, sentinel
from outbox_server.shared.queue.circuits import CircuitChange, log_change
from outbox_server.shared.queue.cluster import ClusterClient, connect_to_cluster
from outbox_server.shared.queue.following import FollowingClient, FollowingPool
from outbox_server.shared.queue.keys import ShardKeys
from outbox_server.shared.queue.queue import DEFAULT_BACKOFF, Queue
from outbox_server.shared.queue.sentinel import connect_by_sentinel
from outbox_server.shared.queue.url_parameters import check_files, check_parameters
from outbox_server.shared.queue.user_limits import UserSendLimits
from outbox_server.shared.settings import Settings
from outbox_server.shared.store_urls import REDIS_FORM

_LONGEST_AUTH_WAIT = timedelta(hours=1)
_CALL_LIMIT_S = 5.0
_CONNECT_LIMIT_S = 2.0
# A listener waits without a time limit, so the kernel must detect that the server is gone.
_KEEPALIVE = {socket.TCP_KEEPIDLE: 5, socket.TCP_KEEPINTVL: 2, socket.TCP_KEEPCNT: 3}

_OF_TCP = ("socket_keepalive", "socket_keepalive_options")
# The errors of calls when Redis is unreachable, slow or out of memory.
QUEUE_ERRORS = (RedisError, OSError)


def connect(settings: Settings, *, listening: bool = False) -> FollowingClient:
    """Return a client. `listening` is for subscriptions, whose reads have no time limit.

    The client must not retry a claim: the first call may have been executed. With a cluster, it is
    the client of the first shard, and `client_of` returns those of the others.

    Raises:
        ConfigurationError: the URL is malformed, or has a wrong parameter.
    """
    options: dict[str, Any] = {
        "decode_responses": True,
        "socket_timeout": None if listening else _CALL_LIMIT_S,
        "socket_connect_timeout": _CONNECT_LIMIT_S,
        "socket_keepalive": True,
        "socket_keepalive_options": _KEEPALIVE,
        "retry": Retry(NoBackoff(), 0),
        "max_connections": None if listening else 100,
    }
    check_files(settings.redis_url)
    if settings.redis_url.startswith(sentinel.SCHEMES):
        return connect_by_sentinel(settings.redis_url, options)
    if settings.redis_url.startswith(cluster.SCHEMES):
        return connect_to_cluster(settings.redis_url, options)
    check_parameters(settings.redis_url)
    if settings.redis_url.startswith("unix://"):
        options = {name: value for name, value in options.items() if name not in _OF_TCP}
    try:
        pool: Any = FollowingPool.from_url(settings.redis_url, **options)
        # Only a connection object shows which values redis-py accepts. It does not connect.
        pool.make_connection()
    except (ValueError, TypeError, RedisError):
        # The error's text may contain the password.
        raise ConfigurationError(
            f"OUTBOX_REDIS_URL: redis-py does not accept it; write {REDIS_FORM}"
        ) from None
    return FollowingClient(pool)


def client_of(redis: FollowingClient, key: str) -> FollowingClient:
    """Return the client of the slot of a key: in a cluster, each has its own."""
    return redis.of_key(key) if isinstance(redis, ClusterClient) else redis


async def nodes_of(redis: FollowingClient) -> Sequence[FollowingClient]:
    """Return a client of each server that may have keys: in a cluster, of each node with slots.

    Raises:
        redis.exceptions.RedisError: the nodes of a cluster cannot be found.
    """
    return await redis.nodes() if isinstance(redis, ClusterClient) else [redis]


def _auth_backoff(backoff: Sequence[timedelta]) -> tuple[timedelta, ...]:
    """Return `backoff` continued by doubling its last wait, up to one hour.

    This is for probes after a failed authentication: trying a wrong password too often locks the
    account.
    """
    waits = [wait for wait in backoff if wait] or [*DEFAULT_BACKOFF]
    while waits[-1] < _LONGEST_AUTH_WAIT:
        waits.append(min(waits[-1] * 2, _LONGEST_AUTH_WAIT))
    return tuple(waits)


def open_queues(
    redis: FollowingClient,
    settings: Settings,
    on_change: Callable[[CircuitChange], None] = log_change,
    key_space: str = "",
) -> list[Queue]:
    """Return the shards of the queue, in their order.

    `on_change` is that of `Queue`, and `key_space` that of `ShardKeys`.
    """
    return [
        Queue(
            client_of(redis, ShardKeys(shard, key_space).ready),
            shard,
            window=settings.rate_window,
            lease=settings.lease,
            backoff=settings.retry_backoff,
            auth_backoff=_auth_backoff(settings.retry_backoff),
            user_limits=UserSendLimits.from_settings(settings),
            key_space=key_space,
            on_change=on_change,
        )
        for shard in range(settings.shards)
    ]
