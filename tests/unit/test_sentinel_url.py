"""URLs of a Redis that Sentinel monitors."""

from __future__ import annotations

import pytest

from outbox_server.shared.errors import ConfigurationError
from outbox_server.shared.queue.sentinel import parse_sentinel_url


def test_all_parts_of_a_url_are_read() -> None:
    found = parse_sentinel_url(
        "rediss+sentinel://app:p%40ss@one:26380,two,[::1]:7/mail/2"
        "?ssl_ca_certs=/ca.crt&sentinel_username=s&sentinel_password=t"
    )
    assert found.hosts == (("one", 26380), ("two", 26379), ("::1", 7))
    assert found.name == "mail"
    tls = {"ssl": True, "ssl_ca_certs": "/ca.crt"}
    assert found.options == {"db": 2, "username": "app", "password": "p@ss", **tls}
    assert found.sentinel_options == {"username": "s", "password": "t", **tls}


def test_a_password_needs_no_user_and_the_database_is_optional() -> None:
    found = parse_sentinel_url("redis+sentinel://:secret@one/mail")
    assert found.options == {"db": 0, "password": "secret"}
    assert found.sentinel_options == {}


@pytest.mark.parametrize(
    ("rest", "complaint"),
    [
        ("one", "the path must be the name"),
        ("one/mail/x", "the path must be the name"),
        ("/mail", "the hosts must be host:port"),
        ("one:70000/mail", "the hosts must be host:port"),
        ("one,,two/mail", "the hosts must be host:port"),
        ("one:0/mail", "the hosts must be host:port"),
        (",".join(["one"] * 21) + "/mail", "at most 20 hosts"),
        ("one/mail?ssl_ca_certs=/ca.crt", "ssl_ca_certs needs the scheme rediss"),
        ("one/mail?db=3", "unknown parameter 'db'"),
    ],
)
def test_a_malformed_url_is_refused_without_its_password(rest: str, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=f"OUTBOX_REDIS_URL: {complaint}") as caught:
        parse_sentinel_url(f"redis+sentinel://:secret@{rest}")
    assert "secret" not in caught.value.message
