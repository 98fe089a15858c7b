"""The name in EHLO."""

from __future__ import annotations

import socket

import pytest

from outbox_server.shared.errors import ConfigurationError
from outbox_server.shared.settings import load_settings
from outbox_server.shared.smtp.helo import address_literal, helo_name


@pytest.mark.parametrize(
    ("host", "resolved", "expected"),
    [
        ("mail.example.com", "other.example.com", "mail.example.com"),
        ("mail", "mail.example.com", "mail.example.com"),
        ("8c1f9a2b77e0", "8c1f9a2b77e0", ""),
        ("mail", "localhost", ""),
        ("mail", "localhost.localdomain", ""),
        ("mail", "mail.localdomain", ""),
        ("mail", "1.0.0.127.in-addr.arpa", ""),
        ("mail", "192.0.2.7", ""),
        ("my_host.example.com", "x", ""),
        ("-a.example.com", "x", ""),
        ("a..example.com", "x", ""),
        ("a b.example.com", "x", ""),
        ("localhost.localdomain", "mail.example.com", ""),
    ],
)
def test_the_host_name_is_used_in_ehlo_if_it_is_fully_qualified(
    monkeypatch: pytest.MonkeyPatch, host: str, resolved: str, expected: str
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    monkeypatch.setattr(socket, "getfqdn", lambda _: resolved)
    assert helo_name(load_settings()) == expected


def test_the_operators_name_takes_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "host.example.com")
    assert helo_name(load_settings(smtp_helo="relay.example.com")) == "relay.example.com"


@pytest.mark.parametrize("name", ["[192.0.2.7]", "[IPv6:2001:db8::7]"])
def test_the_operator_may_set_an_address_literal(name: str) -> None:
    assert helo_name(load_settings(smtp_helo=name)) == name


@pytest.mark.parametrize(
    "name",
    [
        *("mail.x.test x", "mail\r\nQUIT", "m\u00e4il.x.test", "mail\x00"),
        # These are not address literals (RFC 5321, 4.1.3): servers would refuse every session.
        *("[192.0.2]", "[192.0.2.7", "[2001:db8::7]", "[IPv6:192.0.2.7]", "[mail.x.test]"),
    ],
)
def test_an_invalid_ehlo_name_prevents_the_start(name: str) -> None:
    with pytest.raises(ConfigurationError, match="OUTBOX_SMTP_HELO: must be a host name"):
        helo_name(load_settings(smtp_helo=name))


@pytest.mark.parametrize(
    ("sockname", "expected"),
    [
        (("192.0.2.7", 1234), "[192.0.2.7]"),
        (("2001:db8::7", 1234, 0, 0), "[IPv6:2001:db8::7]"),
        (("fe80::1%eth0", 1234, 0, 2), "[IPv6:fe80::1]"),
        (("::ffff:192.0.2.7", 1234, 0, 0), "[192.0.2.7]"),
    ],
)
def test_an_address_literal_is_put_in_brackets(sockname: tuple[object, ...], expected: str) -> None:
    assert address_literal(sockname) == expected
