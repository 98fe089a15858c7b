from __future__ import annotations

import pytest

from outbox_server.shared.errors import PermissionDenied
from outbox_server.shared.sender_domains import check_sender_domain, normalise_domain


@pytest.mark.parametrize(
    ("address", "assigned"),
    [
        ("ann@example.com", "example.com"),
        ("ann@example.com", "EXAMPLE.com"),
        ("ann@Example.COM", "example.com"),
        ("ann@exämple.com", "xn--exmple-cua.com"),
        ("ann@xn--exmple-cua.com", "EXÄMPLE.com"),
        ('"a@evil.org"@example.com', "example.com"),
        ("ann@mail.example.com", "*.example.com"),
        ("ann@a.b.example.com", "*.example.com"),
        ("ann@mail.exämple.com", "*.exämple.com"),
    ],
)
def test_addresses_in_an_assigned_domain_are_allowed(address: str, assigned: str) -> None:
    check_sender_domain(address, [normalise_domain(assigned)], "ann")


@pytest.mark.parametrize(
    ("address", "assigned"),
    [
        ("ann@mail.example.com", "example.com"),
        ("ann@example.com", "*.example.com"),
        ("ann@badexample.com", "*.example.com"),
        ("ann@badexample.com", "example.com"),
        ("ann@example.com.evil.org", "example.com"),
        ("ann@example.org", "example.com"),
        ('"ann@example.com"@evil.org', "example.com"),
        ("ann@[192.0.2.1]", "example.com"),
        ("ann@com", "example.com"),
        ("ann@exаmple.com", "example.com"),  # noqa: RUF001 - the first a is Cyrillic
    ],
)
def test_addresses_in_other_domains_are_refused(address: str, assigned: str) -> None:
    with pytest.raises(PermissionDenied) as caught:
        check_sender_domain(address, [normalise_domain(assigned)], "ann")
    assert caught.value.reason == "SENDER_DOMAIN_NOT_ALLOWED"
    assert caught.value.metadata["user"] == "ann"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "*",
        "*.",
        "com",
        "*.com",
        ".com",
        "example.com.",
        "*.*.com",
        "a b.com",
        "a..com",
        "ann@example.com",
        "-a.com",
        "e\u0301" * 200 + ".com",
        "a" * 64 + ".com",
    ],
)
def test_a_text_that_is_not_a_domain_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a domain|is longer than"):
        normalise_domain(text)
