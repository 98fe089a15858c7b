from __future__ import annotations

import re

import pytest
from email_validator import EmailNotValidError, validate_email
from hypothesis import example, given
from hypothesis import strategies as st

from outbox_server.shared.intake import addresses
from outbox_server.shared.intake.addresses import BadAddress, address_key, check_address

LABELS = st.sampled_from(
    ["example", "a", "x-y", "-x", "x-", "xn--bcher-kva", "ab--c", "1", "A", "a" * 63, "a" * 64, ""]
)
LAST_LABELS = st.sampled_from(
    ["com", "COM", "c", "c1", "1", "test", "TEST", "local", "localhost", "invalid", "onion", "arpa"]
)
LOCALS = st.sampled_from(
    ["ann", "Ann", "Info", "POSTMASTER", "info", ".a", "a.", "a..b", "a+b", "o'neil", "a" * 65, "ü"]
) | st.text(alphabet="aZ0.!#$%&'*+-/=?^_`{|}~\"@ (", max_size=8)
NEARLY = st.builds(
    lambda local, labels, last: f"{local}@{'.'.join([*labels, last])}",
    LOCALS,
    st.lists(LABELS, max_size=5),
    LAST_LABELS,
)


def reason(text: str, *, special_domains: bool = True) -> str:
    with pytest.raises(BadAddress) as caught:
        check_address(text, special_domains=special_domains)
    assert len(caught.value.message) < 400
    # Those are words of the library, whose texts change with its releases.
    assert not re.search(r"-sign|An email|email address|The part|IDNA", caught.value.message)
    return caught.value.reason


@given(NEARLY)
@example("a" * 190 + "@" + "b" * 60 + ".com")
@example("a" * 189 + "@" + "b" * 60 + ".com")
@example("a@" + "b." * 125 + "com")
@example("Webmaster@EXAMPLE.com")
@example("a@example.com\n")
def test_the_fast_check_accepts_only_what_the_library_accepts(text: str) -> None:
    try:
        # Spaces around an address are removed before it is checked.
        expected = validate_email(text.strip(" "), check_deliverability=False).normalized
    except EmailNotValidError:
        reason(text, special_domains=False)
    else:
        assert check_address(text, special_domains=False) == expected
        assert check_address(text) == expected


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("ann", "must have an @ between a name and a domain, such as ann@example.com"),
        ("ann\uff20example.com", "has a character that only looks like an @; write @"),
        ("@example.com", "must have a name before the @"),
        ("a..b@example.com", "must not have two dots in a row"),
        (".a@example.com", "must not begin or end with a dot before the @"),
        ("a(@example.com", "must not contain '(' before the @"),
        ('"a"@example.com', "must not have quotes before the @"),
        ("a@", "must have a domain after the @"),
        ("a@localhost", "must have a dot in the domain after the @"),
        ("a@x_y.example", "must not contain '_' after the @"),
        ("a@-x.example", "must not have a hyphen next to a dot or at an end of its domain"),
        ("a@[192.0.2.1]", "must have the name of a domain after the @, not an IP address"),
        ("a@example.com.", "must not begin or end with a dot after the @"),
        ("a@" + "y" * 64 + ".example", "must have at most 63 characters between dots (got 64)"),
        ("a@x.onion", "must have a domain after the @ that can get mail on the internet"),
    ],
)
def test_the_error_says_what_is_wrong_in_our_words(text: str, fault: str) -> None:
    with pytest.raises(BadAddress) as caught:
        check_address(text)
    assert f" {fault}" in caught.value.message


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("ann@example.com", "ann@example.com"),
        ("  ann@example.com\t", "ann@example.com"),
        ("\u00a0ann@example.com\u00a0", "ann@example.com"),
        ("Ann.Smith@EXAMPLE.Com", "Ann.Smith@example.com"),
        ("ann@BÜCHER.example", "ann@bücher.example"),
        ("ann@xn--bcher-kva.example", "ann@bücher.example"),
        ("jürgen@example.com", "jürgen@example.com"),
    ],
)
def test_an_address_is_returned_in_the_form_that_is_used(text: str, address: str) -> None:
    assert check_address(text) == address


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "EMAIL_MISSING"),
        (" \t ", "EMAIL_MISSING"),
        ("a@example.com, b@example.com", "TWO_ADDRESSES"),
        ("a@example.com;b@example.com", "TWO_ADDRESSES"),
        ("a@example.com b@example.com", "TWO_ADDRESSES"),
        ("A <a@example.com>, B <b@example.com>", "TWO_ADDRESSES"),
        ("a@example.com\r\nBcc: b@example.com", "CONTROL_CHARACTER"),
        ("a@example.com\n", "CONTROL_CHARACTER"),
        ("a\0@example.com", "CONTROL_CHARACTER"),
        ("a@example.com\x85", "CONTROL_CHARACTER"),
        ("ann", "ADDRESS_INVALID"),
        ("a@b@example.com", "ADDRESS_INVALID"),
        ("ann@localhost", "ADDRESS_INVALID"),
        ("mailto:ann@example.com", "ADDRESS_INVALID"),
        ('"a b"@example.com', "ADDRESS_INVALID"),
        ("ann@[127.0.0.1]", "ADDRESS_INVALID"),
        pytest.param("x" * 200_000, "ADDRESS_INVALID", id="long"),
        pytest.param("é" * 200_000 + "@example.com", "ADDRESS_INVALID", id="long, not ASCII"),
    ],
)
def test_an_invalid_address_is_refused_with_a_reason(text: str, expected: str) -> None:
    assert reason(text) == expected


def test_the_error_for_an_address_with_a_name_gives_the_correct_form() -> None:
    with pytest.raises(BadAddress, match=r"write only 'ann@example\.com'") as caught:
        check_address("Ann Smith <ann@example.com>")
    assert caught.value.reason == "ADDRESS_INVALID"


def test_addresses_are_compared_without_case() -> None:
    assert address_key("Ann@example.com") == address_key("aNN@example.com")
    assert address_key("JÜRGEN@example.com") == address_key("ju\u0308rgen@example.com")
    assert address_key("STRAẞE@example.com") == address_key("straße@example.com")
    assert address_key("ann@example.com") != address_key("anna@example.com")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("info@fußball.de", "info@fussball.de"),
        ("groß@example.com", "gross@example.com"),
        ("νίκος@example.com", "νίκοσ@example.com"),
        ("\ufb01n@example.com", "fin@example.com"),
        ("\u0149a@example.com", "\u02bcna@example.com"),
        ("\u017fam@example.com", "sam@example.com"),
        ("\u00b5@example.com", "\u03bc@example.com"),
        ("i\u0307@example.com", "i@example.com"),
        ("\u0131@example.com", "i@example.com"),
        ("\u03d0@example.com", "β@example.com"),
    ],
)
def test_addresses_that_only_case_folding_makes_equal_are_different(one: str, other: str) -> None:
    assert address_key(one) != address_key(other)


@given(st.text(max_size=20))
def test_a_key_is_its_own_key(text: str) -> None:
    assert address_key(address_key(text)) == address_key(text)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("ann@corp.local", "ann@corp.local"),
        ("Ann@Corp.LOCAL", "Ann@corp.local"),
        ("ann@a.b.test", "ann@a.b.test"),
        ("ann@nas.home.arpa", "ann@nas.home.arpa"),
        ("ann@home.arpa", "ann@home.arpa"),
        ("INFO@corp.local", "info@corp.local"),
        ("jürgen@büro.local", "jürgen@büro.local"),
        ("ann@xn--bro-hoa.local", "ann@büro.local"),
    ],
)
def test_domains_of_private_networks_are_accepted_unless_they_are_forbidden(
    text: str, address: str
) -> None:
    assert check_address(text) == address
    assert reason(text, special_domains=False) == "ADDRESS_INVALID"


@pytest.mark.parametrize(
    "text",
    [
        *("ann@local", "ann@test", "ann@x.invalid", "ann@x.localhost", "ann@x.onion"),
        *("ann@1.in-addr.arpa", "ann@x.arpa", "ann@xhome.arpa", "ann@-x.local", "ann@.local"),
        "ann@a..test",
    ],
)
def test_domains_that_no_network_has_are_refused(text: str) -> None:
    assert reason(text) == "ADDRESS_INVALID"


@pytest.mark.parametrize(
    "text",
    [
        "<" + "@" * 8_000,
        "a@" * 100_000,
        "(" * 100_000,
        "a" * 255,
        "a\u0301\u0316" * 10_000 + "@example.com",
        "<" + " " * 100_000 + "a@b",
    ],
)
def test_a_text_longer_than_an_address_is_refused_by_its_length(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seen(*_: object, **__: object) -> None:
        pytest.fail("the library got it")

    monkeypatch.setattr(addresses, "validate_email", seen)
    with pytest.raises(BadAddress) as caught:
        check_address(text)
    assert caught.value.reason == "ADDRESS_INVALID"
    assert f"at most 254 characters (got {len(text):,})" in caught.value.message
    assert len(caught.value.message) < 300


def test_a_long_blank_cell_is_a_missing_address() -> None:
    with pytest.raises(BadAddress) as caught:
        check_address("\n" * 1_000)
    assert caught.value.reason == "EMAIL_MISSING"
