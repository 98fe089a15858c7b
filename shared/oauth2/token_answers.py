"""Interprets the answer of a token endpoint (RFC 6749, sections 5.1 and 5.2). Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any, Final

from outbox_server.shared.redaction import redact

# The lifetime of an access token if the answer has no `expires_in`.
DEFAULT_LIFETIME: Final = timedelta(hours=1)
MAX_LIFETIME: Final = timedelta(days=1)
MAX_RETRY_AFTER: Final = timedelta(minutes=10)
# AUTH must fit into a line of 12,288 octets (RFC 4954, section 4) as base64.
MAX_ACCESS_TOKEN: Final = 8_192
MAX_REFRESH_TOKEN: Final = 8_192
MAX_ERROR: Final = 400

# The characters of a token (RFC 6749, appendix A).
_VISIBLE: Final = re.compile(r"[\x20-\x7e]+", re.ASCII)
_BLANKS: Final = re.compile(r"[\s\x00-\x1f\x7f-\x9f\u2028\u2029]+")
# Errors that say that a later request may succeed; the last is RFC 8628's.
_TEMPORARY_ERRORS: Final = frozenset({"temporarily_unavailable", "server_error", "slow_down"})
_OK: Final = 200
_REDIRECTS: Final = range(300, 400)
_CLIENT_ERRORS: Final = range(400, 500)
_REQUEST_TIMEOUT: Final = 408
_TOO_MANY_REQUESTS: Final = 429
_PREFIX: Final = "OAuth 2.0: "


@dataclass(frozen=True, slots=True)
class Grant:
    """An access token. `refresh_token` is None unless the provider replaces the old one."""

    access_token: str = field(repr=False)
    lifetime: timedelta
    refresh_token: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why there is no access token.

    `refused` means that requests will fail until somebody acts; otherwise a later one may succeed.
    """

    message: str
    refused: bool
    # How long the provider asks to wait; None if it does not say.
    retry_after: timedelta | None = None


def refusal(message: str) -> Failure:
    """Return a failure that lasts until somebody acts."""
    return Failure(f"{_PREFIX}{message}", refused=True)


def outage(message: str, retry_after: timedelta | None = None) -> Failure:
    """Return a failure after which a later try may succeed."""
    return Failure(f"{_PREFIX}{message}", refused=False, retry_after=retry_after)


def read_answer(
    status: int,
    body: bytes,
    *,
    retry_after: str | None,
    now: datetime,
    secrets: Iterable[str],
) -> Grant | Failure:
    """Return the access token in the provider's answer, or why there is none.

    `status` is the HTTP status. `retry_after` is the Retry-After header, or None. `secrets` are
    hidden in the provider's error text.
    """
    document = _document(body)
    error = clean(document.get("error"), secrets)
    if status == _OK and not (error and "access_token" not in document):
        return _read_grant(document)
    wait = _read_wait(retry_after, now)
    if status in _REDIRECTS:
        return refusal(
            f"the token URL answered {status}, a redirect, which is not followed; "
            "set token_url to the address that it leads to"
        )
    if error:
        description = clean(document.get("error_description"), secrets)
        said = f"{error}: {description}" if description else error
        # Some providers answer an error with 200.
        temporary = (
            (status != _OK and status not in _CLIENT_ERRORS)
            or status in (_REQUEST_TIMEOUT, _TOO_MANY_REQUESTS)
            or error in _TEMPORARY_ERRORS
        )
        return outage(said, wait) if temporary else refusal(said)
    # The body is not quoted: it may be a page of a server that is not a token endpoint.
    said = f"the token URL answered {status} without an OAuth 2.0 error"
    if status in _CLIENT_ERRORS and status not in (_REQUEST_TIMEOUT, _TOO_MANY_REQUESTS):
        return refusal(said)
    return outage(said, wait)


def _read_grant(document: dict[str, Any]) -> Grant | Failure:
    access_token = _read_token(document.get("access_token"), MAX_ACCESS_TOKEN)
    if access_token is None:
        return outage("the token URL answered 200 without a usable access_token")
    kind = document.get("token_type", "Bearer")
    if not isinstance(kind, str) or kind.lower() != "bearer":
        return outage("the token URL answered with a token_type other than Bearer")
    lifetime = _read_lifetime(document.get("expires_in"))
    if lifetime is None:
        return outage("the token URL answered with an expires_in that is not a number of seconds")
    replaces = document.get("refresh_token")
    refresh_token = _read_token(replaces, MAX_REFRESH_TOKEN)
    if replaces is not None and refresh_token is None:
        return outage("the token URL answered with an unusable refresh_token")
    return Grant(access_token, lifetime, refresh_token)


def _read_token(value: Any, most: int) -> str | None:
    """Return a token; None if the value is not a token that an SMTP command may contain."""
    if isinstance(value, str) and len(value) <= most and _VISIBLE.fullmatch(value):
        return value
    return None


def _read_lifetime(value: Any) -> timedelta | None:
    """Return the lifetime of an access token; None if the value is not a lifetime."""
    if value is None:
        # RFC 6749, section 5.1: the field is only recommended.
        return DEFAULT_LIFETIME
    # Some providers write the number as a string.
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        seconds = float(value)
    except (ValueError, OverflowError):
        return None
    if not seconds >= 1:
        return None
    return timedelta(seconds=min(seconds, MAX_LIFETIME.total_seconds()))


def _read_wait(text: str | None, now: datetime) -> timedelta | None:
    """Return the wait of a Retry-After header (RFC 9110, section 10.2.3), ten minutes at most.

    None means that there is no such header, or that it cannot be read.
    """
    if text is None:
        return None
    most = MAX_RETRY_AFTER.total_seconds()
    try:
        wait = float(min(int(text), most))
    except ValueError:
        try:
            time = parsedate_to_datetime(text)
        except (ValueError, OverflowError):
            return None
        wait = ((time if time.tzinfo else time.replace(tzinfo=UTC)) - now).total_seconds()
    return timedelta(seconds=min(max(wait, 0), most))


def _document(body: bytes) -> dict[str, Any]:
    """Return the JSON object of an answer; empty if the answer is not a JSON object."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def clean(text: Any, secrets: Iterable[str]) -> str:
    """Return a provider's text as people may read it: one bounded line without secrets.

    The result is empty if `text` is not a string.
    """
    if not isinstance(text, str):
        return ""
    line = _BLANKS.sub(" ", redact(text, secrets)).strip()
    return line[:MAX_ERROR].encode("utf-8", "replace").decode()
