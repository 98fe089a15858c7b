"""The headers that callers may add to their mails: which names, and which values. Pure.

A value is checked as it is in the mail, after its template was rendered. So no cell of a row can
end its header and begin another one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from outbox_server.shared.bounds import MAX_HEADER_BYTES, control_in
from outbox_server.shared.quoting import quoted

_UNSUBSCRIBE: Final = "List-Unsubscribe"
_ONE_CLICK: Final = "List-Unsubscribe-Post"
_ONE_CLICK_VALUE: Final = "List-Unsubscribe=One-Click"
_ALLOWED: Final = {
    name.lower(): name
    for name in (
        _UNSUBSCRIBE,
        _ONE_CLICK,
        "Feedback-ID",
        "Auto-Submitted",
        "Precedence",
        "In-Reply-To",
        "References",
    )
}
_OWN_NAME: Final = re.compile(r"[Xx]-[A-Za-z0-9][A-Za-z0-9-]*", re.ASCII)
# Reserved for headers that Outbox writes itself, such as X-Outbox-Test.
_RESERVED: Final = "x-outbox-"
_URI: Final = r"<(?:https?://|mailto:)[!-;=?-~]+>"
_URIS: Final = re.compile(rf"{_URI}(?: *, *{_URI})*", re.ASCII | re.IGNORECASE)
_MESSAGE_ID: Final = r"<[!-;=?A-~]+@[!-;=?A-~]+>"
_MESSAGE_IDS: Final = re.compile(rf"{_MESSAGE_ID}(?: *{_MESSAGE_ID})*", re.ASCII)


class BadHeader(ValueError):
    """A header is not allowed, or its value is wrong: HEADER_INVALID or HEADER_TOO_LONG."""

    def __init__(self, message: str, reason: str = "HEADER_INVALID") -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


def header_name(name: str) -> str:
    """Return an allowed name in its usual spelling.

    Raises:
        BadHeader: it is not allowed.
    """
    lowered = name.lower()
    if lowered in _ALLOWED:
        return _ALLOWED[lowered]
    if not _OWN_NAME.fullmatch(name) or lowered.startswith(_RESERVED):
        raise BadHeader(
            f"{quoted(name)} is not allowed; allowed are {', '.join(_ALLOWED.values())}, and "
            "names of letters, digits and `-` that begin with `X-`, but not with X-Outbox-"
        )
    return name


def is_encodable(name: str) -> bool:
    """Return whether the header may have characters beyond ASCII, which are encoded."""
    return name.lower() not in _ALLOWED


def check_header(name: str, value: str) -> None:
    """Check a value that is not empty.

    Raises:
        BadHeader: it cannot be the value of this header.
    """
    if control := control_in(value):
        raise BadHeader(f"{name} cannot contain a control character ({control})")
    size = len(name) + len(": ") + len(value.encode("utf-8", "replace"))
    if size > MAX_HEADER_BYTES:
        raise BadHeader(
            f"{name}, with its value, can have at most {MAX_HEADER_BYTES} bytes (got {size:,})",
            "HEADER_TOO_LONG",
        )
    if not is_encodable(name) and not value.isascii():
        raise BadHeader(f"{name} can have only ASCII characters (got {quoted(value)})")
    if name == _UNSUBSCRIBE and not _URIS.fullmatch(value):
        raise BadHeader(
            f"{name} must be https, http or mailto URIs in angle brackets, separated by commas, "
            f"such as <https://example.com/u?id=1> (got {quoted(value)})"
        )
    if name == _ONE_CLICK and value != _ONE_CLICK_VALUE:
        raise BadHeader(f"{name} must be exactly {_ONE_CLICK_VALUE} (got {quoted(value)})")
    if name in ("In-Reply-To", "References") and not _MESSAGE_IDS.fullmatch(value):
        raise BadHeader(
            f"{name} must be Message-IDs in angle brackets, such as <1@example.com> "
            f"(got {quoted(value)})"
        )


def check_headers(headers: Sequence[tuple[str, str]]) -> None:
    """Check the headers of one mail together. Headers with empty values are left out.

    Raises:
        BadHeader: List-Unsubscribe-Post lacks its List-Unsubscribe.
    """
    values = dict(headers)
    if _ONE_CLICK in values and "<https://" not in values.get(_UNSUBSCRIBE, "").lower():
        raise BadHeader(f"{_ONE_CLICK} needs a {_UNSUBSCRIBE} with an https URI (RFC 8058)")


def needs_unsubscribe(names: Sequence[str]) -> bool:
    """Return whether the header that List-Unsubscribe-Post needs is missing."""
    return _ONE_CLICK in names and _UNSUBSCRIBE not in names
