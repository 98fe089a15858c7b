"""Opaque page tokens (AIP-158), which contain a position, and the bounds of page sizes."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from typing import Final, TypeVar, cast

from outbox_server.shared.bounds import PAGE_TOKEN
from outbox_server.shared.errors import InvalidInput

DEFAULT_PAGE_SIZE: Final = 50
MAX_PAGE_SIZE: Final = 1000

Position = tuple[int | str, ...]
P = TypeVar("P", bound=Position)

_SUM_BYTES: Final = 9  # so the first twelve characters of a token are the checksum
# The largest id in PostgreSQL (bigint). Positions are ids, other numbers, and addresses.
MAX_ID: Final = 2**63 - 1


def page_size(requested: int) -> int:
    """Return the page size to use: 50 if it is unset (0), at most 1000.

    Raises:
        InvalidInput: it is negative (PAGE_SIZE_INVALID).
    """
    if requested < 0:
        raise InvalidInput.field(
            "page_size",
            f"must be 0 (the default, {DEFAULT_PAGE_SIZE}) to {MAX_PAGE_SIZE:,} (got {requested})",
            reason="PAGE_SIZE_INVALID",
        )
    return min(requested or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)


def digest_filters(*filters: object) -> bytes:
    """Return a digest of the filters of a list, including the user, without the page size.

    Each must have a `repr` with its value: str, int, bool, None, enums, tuples of them.
    """
    return hashlib.blake2b(repr(filters).encode(), digest_size=16).digest()


def encode(kind: str, filters_digest: bytes, position: Position) -> str:
    """Return the token that continues after `position` in the list `kind` with these filters."""
    payload = _payload(position)
    return _text(_sum(kind, filters_digest, payload) + payload)


def check_form(field: str, token: str) -> None:
    """Check that `encode` may have made the token, for any list. `field` names the token's field.

    Raises:
        InvalidInput: PAGE_TOKEN_INVALID, RESUME_TOKEN_INVALID.
    """
    if _raw(token) is None:
        reason = f"{field.upper()}_INVALID"
        raise InvalidInput.field(field, "is not a token of this server", reason=reason)


def decode_resume(
    token: str, kind: str, filters_digest: bytes, parts: Sequence[type] = (str,)
) -> Position | None:
    """Return the position at which to resume a stream; None (the start) for an empty token.

    `parts` are the types of its parts.

    Raises:
        InvalidInput: the token is damaged, not ours, or of another stream (RESUME_TOKEN_INVALID).
    """
    position = _position(token, kind, filters_digest) if token else None
    if token and (position is None or list(map(type, position)) != list(parts)):
        raise InvalidInput.field(
            "resume_token",
            "is not a token of this stream; pass its last resume_token, or none to start over",
            reason="RESUME_TOKEN_INVALID",
        )
    return position


def decode(token: str, kind: str, filters_digest: bytes, start: P, *, largest: int = MAX_ID) -> P:
    """Return the position in a token of `encode`; `start` (the first page) for an empty token.

    `largest` is the largest number that a position of this list can have.

    The checksum detects mistakes. It is not secret and need not be: a position only says where to
    continue among the rows that the caller may see anyway. So a caller can forge a token, and its
    content is checked like any other input.

    Raises:
        InvalidInput: the token is damaged, not ours, or of another query (PAGE_TOKEN_INVALID).
    """
    if not token:
        return start
    position = _position(token, kind, filters_digest)
    if (
        position is None
        or list(map(type, position)) != list(map(type, start))
        or any(part > largest for part in position if isinstance(part, int))
    ):
        raise InvalidInput.field(
            "page_token",
            "is not a token of this list with these filters; "
            "pass next_page_token of the last page with the same filters, or none to start over",
            reason="PAGE_TOKEN_INVALID",
        )
    return cast(P, position)


def _position(token: str, kind: str, filters_digest: bytes) -> Position | None:
    """Return the position in a token; None if `encode` cannot have made the token."""
    raw = _raw(token)
    if raw is None:
        return None
    payload = raw[_SUM_BYTES:]
    if raw[:_SUM_BYTES] != _sum(kind, filters_digest, payload):
        return None
    try:
        parts = json.loads(payload)
    except (ValueError, RecursionError):  # not JSON, not UTF-8, or nested too deeply
        return None
    if not isinstance(parts, list) or not all(map(_may_be_in_a_position, parts)):
        return None
    position = tuple(parts)
    return position if _payload(position) == payload else None


def _raw(token: str) -> bytes | None:
    """Return the bytes of a token; None if the text cannot be a token."""
    if len(token) > PAGE_TOKEN.most:
        return None
    try:
        raw = base64.urlsafe_b64decode(token.encode("ascii") + b"=" * (-len(token) % 4))
    except ValueError:  # not ASCII, or not base64
        return None
    # The decoder skips other characters and ignores spare bits, so the text is compared with our
    # own encoding.
    return raw if _text(raw) == token and len(raw) > _SUM_BYTES else None


def _may_be_in_a_position(part: object) -> bool:
    """Return whether PostgreSQL can compare the value with a column. A bool is not an id."""
    if type(part) is int:
        return 0 <= part <= MAX_ID
    # A lone surrogate has no form in UTF-8.
    return (
        isinstance(part, str)
        and "\0" not in part
        and not any("\ud800" <= character <= "\udfff" for character in part)
    )


def _payload(position: Position) -> bytes:
    return json.dumps(position, separators=(",", ":")).encode()


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _sum(kind: str, filters_digest: bytes, payload: bytes) -> bytes:
    head = json.dumps([kind, filters_digest.hex()]).encode()
    return hashlib.blake2b(head + payload, digest_size=_SUM_BYTES, person=b"outbox.page").digest()
