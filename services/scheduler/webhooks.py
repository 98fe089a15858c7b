"""The URLs that a webhook may have, the signatures of its requests, and the waits between them."""

from __future__ import annotations

import base64
import hmac
import re
import secrets as random
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Final
from urllib.parse import urlsplit

from outbox_server.shared import bounds
from outbox_server.shared.errors import InvalidInput

_SECRET_BYTES: Final = 24
_PREFIX: Final = "whsec_"
_VISIBLE: Final = re.compile(r"[\x21-\x7e]+")
_LEAST_PORT: Final = 1024
_HTTPS: Final = 443
_LONGEST_PAUSE: Final = timedelta(minutes=5)


def new_secret() -> str:
    """Return a new secret for signatures."""
    return _PREFIX + base64.b64encode(random.token_bytes(_SECRET_BYTES)).decode()


def sign(secrets: Sequence[str], message_id: str, timestamp: int, body: bytes) -> str:
    """Return the header `webhook-signature` of a request, after Standard Webhooks.

    It has a signature by each secret, separated by spaces.
    """
    signed = f"{message_id}.{timestamp}.".encode() + body
    keys = (base64.b64decode(secret.removeprefix(_PREFIX)) for secret in secrets)
    return " ".join(
        "v1," + base64.b64encode(hmac.digest(key, signed, "sha256")).decode() for key in keys
    )


def check_url(field: str, text: str, is_listed: Callable[[str], bool] = lambda _: False) -> str:
    """Return the URL. Its address is checked later, when a connection is opened.

    `is_listed` returns whether a host may be reached by http and at any port.

    Raises:
        InvalidInput: WEBHOOK_URL_INVALID.
    """
    bounds.WEBHOOK_URL.check(field, text)
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise _invalid(field, "is not a URL") from None
    if not _VISIBLE.fullmatch(text) or not host or parts.scheme not in ("http", "https"):
        raise _invalid(field, "must be an absolute https URL, in visible ASCII characters")
    if parts.username is not None or parts.password is not None or parts.fragment:
        raise _invalid(field, "must not have a user name, a password or a fragment")
    if is_listed(host):
        return text
    if parts.scheme != "https":
        raise _invalid(field, "must begin with https://")
    if port is not None and port != _HTTPS and port < _LEAST_PORT:
        raise _invalid(field, f"must have port 443 or 1024 to 65535 (got {port})")
    return text


def message_id(webhook_id: int, after_event: int, last_event: int) -> str:
    """Return the header `webhook-id`, which is the same for each try of a delivery."""
    return f"msg_{webhook_id}_{after_event}_{last_event}"


def pause_after(failures: int) -> timedelta:
    """Return how long a webhook is paused after this number of failures in a row."""
    return min(timedelta(seconds=2 ** min(failures, 10)), _LONGEST_PAUSE)


def wait_before(attempts: int, backoff: Sequence[timedelta]) -> timedelta | None:
    """Return the wait after this number of failed tries of a delivery; None means to give up."""
    return backoff[attempts - 1] if attempts <= len(backoff) else None


def _invalid(field: str, text: str) -> InvalidInput:
    return InvalidInput.field(field, text, reason="WEBHOOK_URL_INVALID")
