"""The answers of token endpoints, and their meanings."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from outbox_server.shared.oauth2.token_answers import MAX_ERROR, Failure, Grant, read_answer
from outbox_server.shared.redaction import MAX_TEXT

NOW = datetime(2026, 11, 28, 12, 0, tzinfo=UTC)
SECRETS = ("shh-client-secret", "1//refresh-token-0001")
GOOGLE = {"access_token": "ya29.token", "expires_in": 3599, "token_type": "Bearer"}


def read(status: int, document: Any, retry_after: str | None = None) -> Grant | Failure:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return read_answer(status, body, retry_after=retry_after, now=NOW, secrets=SECRETS)


def failure(status: int, document: Any, retry_after: str | None = None) -> Failure:
    found = read(status, document, retry_after)
    assert isinstance(found, Failure), found
    return found


def test_an_answer_of_google_has_a_token_and_no_new_refresh_token() -> None:
    answer = read(200, GOOGLE)
    assert answer == Grant("ya29.token", timedelta(seconds=3599), None)
    assert "ya29" not in repr(answer)


def test_an_answer_of_microsoft_has_a_new_refresh_token() -> None:
    answer = read(200, GOOGLE | {"refresh_token": "1.AXoA", "ext_expires_in": 3599})
    assert isinstance(answer, Grant)
    assert answer.refresh_token == "1.AXoA"
    assert "AXoA" not in repr(answer)


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ({}, 3600),
        ({"expires_in": None}, 3600),
        ({"expires_in": "3599"}, 3599),
        ({"expires_in": 1}, 1),
        ({"expires_in": 10**9}, 86_400),
        ({"expires_in": 1e300}, 86_400),
    ],
)
def test_a_lifetime_is_bounded_and_may_be_missing(given: dict[str, Any], seconds: int) -> None:
    answer = read(200, {"access_token": "t", "token_type": "bearer", **given})
    assert isinstance(answer, Grant)
    assert answer.lifetime == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"<html>",
        b"[" * 60_000,
        b"[]",
        b"\xff\xfe",
        b'{"access_token": "t", "expires_in": ' + b"9" * 5_000 + b"}",
        {},
        {"access_token": ""},
        {"access_token": 7},
        {"access_token": "a\r\nMAIL FROM:<x@y.test>"},
        {"access_token": "t" * 8_193},
        {"access_token": "t", "token_type": "mac"},
        {"access_token": "t", "token_type": 1},
        {"access_token": "t", "expires_in": 0},
        {"access_token": "t", "expires_in": -5},
        {"access_token": "t", "expires_in": "soon"},
        {"access_token": "t", "expires_in": True},
        {"access_token": "t", "expires_in": float("nan")},
        {"access_token": "t", "refresh_token": ["x"]},
        {"access_token": "t", "refresh_token": "r" * 8_193},
    ],
)
def test_an_answer_without_a_token_is_a_temporary_failure(document: Any) -> None:
    found = failure(200, document)
    assert not found.refused
    assert found.message.startswith("OAuth 2.0: the token URL answered")


@pytest.mark.parametrize(
    "error", ["invalid_grant", "invalid_client", "unauthorized_client", "invalid_scope", "novel"]
)
def test_an_error_of_the_provider_is_a_refusal(error: str) -> None:
    found = failure(400, {"error": error, "error_description": "Token has been revoked."})
    assert found == Failure(f"OAuth 2.0: {error}: Token has been revoked.", refused=True)


def test_an_error_without_a_description_is_shown_without_one() -> None:
    assert failure(401, {"error": "invalid_client"}).message == "OAuth 2.0: invalid_client"


@pytest.mark.parametrize(
    ("status", "document"),
    [
        (500, b"oops"),
        (502, b"<html>"),
        (503, {"error": "invalid_grant"}),
        (429, b""),
        (429, {"error": "invalid_request"}),
        (408, b""),
        (400, {"error": "temporarily_unavailable"}),
        (400, {"error": "server_error"}),
        (400, {"error": "slow_down"}),
        (204, b""),
    ],
)
def test_a_server_error_of_the_provider_is_a_temporary_failure(status: int, document: Any) -> None:
    assert not failure(status, document).refused


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405])
def test_a_client_error_without_json_is_a_refusal_that_quotes_nothing(status: int) -> None:
    found = failure(status, b"<html>internal page</html>")
    assert found.refused
    assert found.message == f"OAuth 2.0: the token URL answered {status} without an OAuth 2.0 error"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308, 304])
def test_a_redirect_is_a_refusal(status: int) -> None:
    found = failure(status, b"")
    assert found.refused
    assert "redirect" in found.message


@pytest.mark.parametrize(
    ("header", "wait"),
    [
        (None, None),
        ("7", timedelta(seconds=7)),
        ("0", timedelta(0)),
        ("-3", timedelta(0)),
        ("99999", timedelta(minutes=10)),
        ("9" * 30, timedelta(minutes=10)),
        ("Sat, 28 Nov 2026 12:01:00 GMT", timedelta(minutes=1)),
        ("Sat, 28 Nov 2026 11:00:00 GMT", timedelta(0)),
        ("Sat, 28 Nov 2099 11:00:00 GMT", timedelta(minutes=10)),
        ("soon", None),
        ("9" * 5_000, None),
    ],
)
def test_the_wait_requested_by_a_provider_is_bounded(
    header: str | None, wait: timedelta | None
) -> None:
    assert failure(429, b"", header).retry_after == wait


@pytest.mark.parametrize(
    "header",
    [
        "Mon, 01 Jan 99999999999999999999 00:00:00 GMT",
        "Mon, 01 Jan 2030 00:00:00 +" + "9" * 400,
        "1 Jan 2030 99999999999999999999:00:00",
        "9" * 5_000,
    ],
)
def test_an_impossible_retry_date_is_ignored(header: str) -> None:
    assert failure(503, b"", header).retry_after is None


def test_an_error_with_status_200_is_still_an_error() -> None:
    refused = failure(200, {"error": "bad_refresh_token", "error_description": "It is revoked."})
    assert refused.refused
    assert refused.message == "OAuth 2.0: bad_refresh_token: It is revoked."
    assert not failure(200, {"error": "temporarily_unavailable"}).refused


def test_a_description_is_one_bounded_line() -> None:
    said = "AADSTS70008: it has expired.\r\nTrace ID: 1\x00\x1b[31m\u2028" + "x" * 5_000
    found = failure(400, {"error": "invalid_grant", "error_description": said})
    assert found.message.startswith(
        "OAuth 2.0: invalid_grant: AADSTS70008: it has expired. Trace ID: 1 [31m xx"
    )
    assert found.message.isprintable()
    assert len(found.message) <= MAX_ERROR + 60


def test_a_lone_surrogate_is_replaced() -> None:
    found = failure(400, b'{"error": "invalid_grant", "error_description": "\\ud800"}')
    assert found.message == "OAuth 2.0: invalid_grant: ?"


@pytest.mark.parametrize("field", ["error", "error_description"])
def test_secrets_that_a_provider_quotes_are_hidden(field: str) -> None:
    quoted = " and ".join((*SECRETS, SECRETS[1][:15]))
    found = failure(400, {"error": "e"} | {field: quoted})
    assert "[secret] and [secret] and [secret]" in found.message


@pytest.mark.parametrize("before", range(MAX_TEXT - 10, MAX_TEXT + 1))
def test_a_secret_at_the_cut_of_a_long_text_is_hidden_completely(before: int) -> None:
    quoted = f"{SECRETS[1]}{SECRETS[0]}" * 100
    said = quoted[:before] + " " + SECRETS[0]
    found = failure(400, {"error": "e", "error_description": said})
    assert not any(secret[:6] in found.message for secret in SECRETS), found.message
