"""URLs of one Redis server, and the parameters that they may have."""

from __future__ import annotations

from typing import Any

import pytest

from outbox_server.shared.errors import ConfigurationError
from outbox_server.shared.queue.connection import connect
from outbox_server.shared.settings import load_settings


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("rediss://:hunter2@h/0?ssl_cert_reqs=hunter2", "redis-py does not accept it"),
        ("rediss://:hunter2@h/0?ssl_ca=hunter2", "unknown parameter 'ssl_ca'"),
        ("redis://:hunter2@h/0?socket_timeout=hunter2", "redis-py does not accept it"),
        ("redis://:hunter2@h/0?decode_responses=false", "unknown parameter 'decode_responses'"),
        ("redis://:hunter2@h/0?retry=5", "unknown parameter 'retry'"),
        ("redis://:hunter2@h/0?max_connections=1", "unknown parameter 'max_connections'"),
        ("redis://:hunter2@h/0?protocol=9", "redis-py does not accept it"),
        ("redis://:hunter2@h/0?connection_class=x", "unknown parameter 'connection_class'"),
        ("unix:///run/redis.sock?host=hunter2", "unknown parameter 'host'"),
    ],
)
def test_a_parameter_that_cannot_be_used_is_named(url: str, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^OUTBOX_REDIS_URL: {complaint}") as caught:
        connect(load_settings(redis_url=url))
    assert "hunter2" not in caught.value.message


@pytest.mark.parametrize(
    "url",
    [
        "unix:///run/redis.sock?db=2",
        "unix://app:secret@/run/redis.sock",
        "redis://app:p%40ss@h:7/3?client_name=outbox&socket_timeout=1",
        "redis://h?protocol=3&health_check_interval=30&socket_keepalive=1&retry_on_timeout=yes",
        "rediss://h?ssl_ca_certs=/ca&ssl_check_hostname=false&ssl_cert_reqs=required",
    ],
)
def test_other_urls_are_accepted(url: str) -> None:
    pool: Any = connect(load_settings(redis_url=url)).connection_pool
    # A claim that is repeated could take jobs twice.
    assert pool.make_connection().retry.get_retries() == 0
