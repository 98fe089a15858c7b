"""The parameters of the URL of PostgreSQL: a wrong one is named without a connection."""

from __future__ import annotations

import pytest

from outbox_server.shared.database.connecting import parse_target
from outbox_server.shared.errors import ConfigurationError

PLACE = "postgresql://outbox:hunter2@127.0.0.1:9/outbox"


@pytest.mark.parametrize(
    ("query", "complaint"),
    [
        ("sslmode=bogus", "sslmode must be one of disable, allow, prefer, require, verify-ca, "),
        ("sslmode=REQUIRE", "sslmode must be one of disable"),
        ("sslmode=", "sslmode must be one of disable"),
        ("target_session_attrs=master", "target_session_attrs must be one of any, read-write"),
        ("channel_binding=yes", "channel_binding must be one of disable, prefer, require"),
        ("gssencmode=on", "gssencmode must be one of"),
        ("load_balance_hosts=yes", "load_balance_hosts must be one of disable, random"),
        ("ssl_min_protocol_version=1.2", "ssl_min_protocol_version must be one of TLSv1, "),
        ("client_encoding=latin1", "client_encoding must be UTF8"),
        ("keepalives=yes", "keepalives must be one of 0, 1"),
        ("connect_timeout=abc", "connect_timeout must be a whole number of seconds"),
        ("connect_timeout=5s", "connect_timeout must be a whole number of seconds"),
        ("connect_timeout=-1", "connect_timeout must be a whole number of seconds"),
        ("connect_timeout=" + "9" * 5000, "connect_timeout must be a whole number of seconds"),
        ("tcp_user_timeout=10s", "tcp_user_timeout must be a whole number of milliseconds"),
        ("keepalives_idle=\u0665", "keepalives_idle must be a whole number of seconds"),
        ("sslrootcert=/gone/ca.crt", "sslrootcert must be a file that exists"),
        ("sslkey=/gone/key", "sslkey must be a file that exists"),
        # libpq's own checks.
        ("require_auth=magic", "libpq refuses its parameters: invalid require_auth"),
        ("sslrootcert=system&sslmode=prefer", "libpq refuses its parameters: weak sslmode"),
        (
            "ssl_min_protocol_version=TLSv1.3&ssl_max_protocol_version=TLSv1.2",
            "libpq refuses its parameters: invalid SSL protocol version range",
        ),
        ("host=a,b&port=1,2,3", "libpq refuses its parameters: could not match 3 port numbers"),
        ("port=abc", "libpq refuses its parameters: invalid integer value"),
        ("service=nowhere", "libpq refuses its parameters: "),
        ("ssl_mode=require", "has an unknown parameter 'ssl_mode'"),
        ("prepare_threshold=often", "prepare_threshold must be none or a number of uses"),
    ],
)
def test_a_parameter_that_cannot_be_used_is_named(query: str, complaint: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_target(f"{PLACE}?{query}")
    assert caught.value.message.startswith(f"OUTBOX_DATABASE_URL: {complaint}")
    assert "\n" not in caught.value.message
    assert "hunter2" not in caught.value.message


@pytest.mark.parametrize(
    "query",
    [
        "sslmode=verify-full&sslrootcert=system",
        f"sslmode=verify-ca&sslrootcert={__file__}&sslcert={__file__}",
        "connect_timeout=0&keepalives=0&tcp_user_timeout=2147483647&client_encoding=UTF8",
        "client_encoding=utf8",
        "client_encoding=UTF-8",
        "target_session_attrs=read-write&load_balance_hosts=random&application_name=a%20b",
        "host=/var/run/postgresql&port=5433",
        "hostaddr=192.0.2.1",
        "require_auth=scram-sha-256&channel_binding=require&options=-c%20geqo%3Doff",
        "prepare_threshold=none&sslnegotiation=direct&sslmode=require",
    ],
)
def test_other_parameters_are_accepted(query: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Where libpq would connect to, if it were asked to.
    monkeypatch.setenv("PGHOSTADDR", "192.0.2.1")
    assert parse_target(f"{PLACE}?{query}").parameters["dbname"] == "outbox"


def test_several_hosts_are_accepted() -> None:
    url = "postgresql://outbox@db1:5432,db2:5433/outbox?target_session_attrs=read-write"
    assert parse_target(url).parameters["host"] == "db1,db2"
