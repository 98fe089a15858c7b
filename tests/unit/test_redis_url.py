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
        ("rediss://:x@h?ssl_cert_reqs=hunter2", "ssl_cert_reqs must be none, optional or required"),
        ("rediss://:x@h?ssl_check_hostname=hunter2", "ssl_check_hostname must be yes or no"),
        ("rediss://:x@h?ssl_min_version=hunter2", "ssl_min_version must be 771 "),
        ("rediss://:x@h?ssl_include_verify_flags=VERIFY_HUNTER2", "redis-py does not accept it"),
        ("rediss://:x@h?ssl_ca_certs=/gone/ca.crt", "ssl_ca_certs must be a file that exists"),
        ("rediss+sentinel://h/n?ssl_ca_certs=/gone", "ssl_ca_certs must be a file that exists"),
        ("rediss+cluster://h?ssl_ca_certs=/gone", "ssl_ca_certs must be a file that exists"),
        ("redis://h?ssl_check_hostname=no", "ssl_check_hostname needs the scheme rediss"),
        ("rediss://:x@h?ssl_ca=hunter2", "unknown parameter 'ssl_ca'; known are client_name, db, "),
        ("redis://:x@h?socket_timeout=hunter2", "socket_timeout must be a number of seconds"),
        ("redis://h?socket_timeout=0", "socket_timeout must be a number of seconds"),
        ("redis://h?socket_connect_timeout=-1", "socket_connect_timeout must be a number of"),
        ("redis://h?socket_connect_timeout=nan", "socket_connect_timeout must be a number of"),
        ("redis://h?socket_keepalive=perhaps", "socket_keepalive must be yes or no"),
        ("redis://h?retry_on_timeout=", "retry_on_timeout must be yes or no"),
        ("redis://h?health_check_interval=1.5", "health_check_interval must be a whole number"),
        ("redis://h?db=-1", "db must be the number of a database"),
        ("unix:///s?db=x", "db must be the number of a database"),
        ("redis://h?client_name=two%20words", "client_name must be a text without spaces"),
        ("redis://:x@h/0?decode_responses=false", "unknown parameter 'decode_responses'"),
        ("redis://:x@h/0?retry=5", "unknown parameter 'retry'"),
        ("redis://:x@h/0?max_connections=1", "unknown parameter 'max_connections'"),
        ("redis://:x@h/0?protocol=9", "protocol must be 2 or 3"),
        ("redis://:x@h/0?connection_class=x", "unknown parameter 'connection_class'"),
        ("unix:///run/redis.sock?host=hunter2", "unknown parameter 'host'"),
    ],
)
def test_a_parameter_that_cannot_be_used_is_named(url: str, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^OUTBOX_REDIS_URL: {complaint}") as caught:
        connect(load_settings(redis_url=url))
    assert "hunter2" not in caught.value.message.lower()
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "url",
    [
        "unix:///run/redis.sock?db=2",
        "unix://app:secret@/run/redis.sock",
        "redis://app:p%40ss@h:7/3?client_name=outbox&socket_timeout=1",
        "redis://h?protocol=3&health_check_interval=30&socket_keepalive=1&retry_on_timeout=yes",
        f"rediss://h?ssl_ca_certs={__file__}&ssl_check_hostname=false&ssl_cert_reqs=required",
        "rediss://h?ssl_min_version=772&ssl_include_verify_flags=VERIFY_X509_STRICT",
        "redis://h?socket_connect_timeout=.5&socket_read_size=65536&protocol=2",
    ],
)
def test_other_urls_are_accepted(url: str) -> None:
    pool: Any = connect(load_settings(redis_url=url)).connection_pool
    # A claim that is repeated could take jobs twice.
    assert pool.make_connection().retry.get_retries() == 0
