from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox_server.shared.errors import InvalidInput
from outbox_server.shared.rpc.page_tokens import (
    decode,
    decode_resume,
    digest_filters,
    encode,
    page_size,
)
from tests.forged_tokens import forged

FILTERS = digest_filters("u1", "7", 3)
START = (0,)
numbers = st.integers(min_value=0, max_value=2**63 - 1)
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=50)
positions = st.lists(numbers | texts, min_size=1, max_size=4).map(tuple)


@given(position=positions)
def test_a_page_token_round_trips_its_position(position: tuple[int | str, ...]) -> None:
    token = encode("jobs", FILTERS, position)
    start = tuple(type(part)() for part in position)
    assert decode(token, "jobs", FILTERS, start) == position
    assert "=" not in token


def test_an_empty_token_is_the_first_page() -> None:
    assert decode("", "jobs", FILTERS, (0, "")) == (0, "")


@given(position=positions, at=st.integers(min_value=0), other=st.characters())
def test_a_token_with_one_other_character_is_refused(
    position: tuple[int | str, ...], at: int, other: str
) -> None:
    token = encode("jobs", FILTERS, position)
    at %= len(token)
    damaged = token[:at] + other + token[at + 1 :]
    if damaged != token:
        refused(damaged)


@pytest.mark.parametrize("token", ["x", "hello", "\u2713", "AAAA", "=" * 8, "A" * 100_000])
def test_a_malformed_page_token_is_refused(token: str) -> None:
    refused(token)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"5",
        b"null",
        b"[1",
        b"[]",
        b"{}",
        b'"1"',
        b"[[1]]",
        b"[1,1]",
        b"[1.0]",
        b"[1e400]",
        b"[NaN]",
        b"[true]",
        b'["1"]',
        b"[-1]",
        b"[ 1]",
        b"[9223372036854775808]",
        b"[" + b"9" * 2_900 + b"]",
        b"[" * 2_900,
        b"\xff\xfe",
    ],
)
def test_a_forged_token_with_a_right_checksum_is_refused(payload: bytes) -> None:
    refused(forged("jobs", FILTERS, payload))


@pytest.mark.parametrize(
    "payload", [b'["\\u0000"]', b'["\\ud800"]', b'["\\udfff\\ud800"]', b'["\xc3"]']
)
def test_a_forged_text_that_postgresql_cannot_store_is_refused(payload: bytes) -> None:
    with pytest.raises(InvalidInput) as caught:
        decode(forged("jobs", FILTERS, payload), "jobs", FILTERS, ("",))
    assert caught.value.reason == "PAGE_TOKEN_INVALID"


@pytest.mark.parametrize("payload", [b"5", b"[1", b"[1]", b'["a","b"]', b"[]", b"[" * 2_900])
def test_a_forged_resume_token_is_refused(payload: bytes) -> None:
    with pytest.raises(InvalidInput) as caught:
        decode_resume(forged("watch", FILTERS, payload), "watch", FILTERS)
    assert caught.value.reason == "RESUME_TOKEN_INVALID"


def test_a_page_token_of_other_filters_is_refused() -> None:
    refused(encode("jobs", digest_filters("u2", "7", 3), (1,)))


def test_a_token_of_another_list_is_refused() -> None:
    refused(encode("batches", FILTERS, (1,)))


def test_a_longer_or_shorter_token_is_refused() -> None:
    token = encode("jobs", FILTERS, (1,))
    for damaged in (token + "A", token + "=", token + "\n", token[:-1], token[1:]):
        refused(damaged)


def test_filters_that_look_alike_have_different_digests() -> None:
    assert digest_filters("1", "23") != digest_filters("12", "3")
    assert digest_filters("1") != digest_filters(1)
    assert digest_filters(None) != digest_filters("")


@pytest.mark.parametrize(("requested", "used"), [(0, 50), (1, 1), (1000, 1000), (1001, 1000)])
def test_an_unset_page_size_means_50_and_a_large_one_is_capped_at_1000(
    requested: int, used: int
) -> None:
    assert page_size(requested) == used


def test_a_negative_page_size_is_refused() -> None:
    with pytest.raises(InvalidInput) as caught:
        page_size(-1)
    assert caught.value.reason == "PAGE_SIZE_INVALID"
    assert caught.value.violations[0].field == "page_size"


def refused(token: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        decode(token, "jobs", FILTERS, START)
    assert caught.value.reason == "PAGE_TOKEN_INVALID"
    assert caught.value.violations[0].field == "page_token"
