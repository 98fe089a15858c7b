"""Pages of a list (AIP-158): opaque tokens that hold a position, and the rule of page sizes."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Final, TypeVar, cast

from outbox_server.shared.errors import InvalidInput

DEFAULT_PAGE_SIZE: Final = 50
MAX_PAGE_SIZE: Final = 1000

Position = tuple[int | str, ...]
P = TypeVar("P", bound=Position)

_SUM_BYTES: Final = 9  # with it the first twelve characters of a token are the sum
_MAX_TOKEN: Final = 4096


def page_size(requested: int) -> int:
    """Return the size to use: 50 where it is unset (0), at most 1000.

    Raises:
        InvalidInput: it is negative (PAGE_SIZE_INVALID).
    """
    if requested < 0:
        raise InvalidInput.field(
            "page_size",
            f"must be from 0 (the default, {DEFAULT_PAGE_SIZE}) to {MAX_PAGE_SIZE}, "
            f"and is {requested}",
            reason="PAGE_SIZE_INVALID",
        )
    return min(requested or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)


def digest_filters(*filters: object) -> bytes:
    """Return a digest of what a list was asked for, the user included, the page size not.

    Each must have a `repr` that says its value: str, int, bool, None, enums, tuples of them.
    """
    return hashlib.blake2b(repr(filters).encode(), digest_size=16).digest()


def encode(kind: str, filters_digest: bytes, position: Position) -> str:
    """Return the token that goes on after `position` in the list `kind` with these filters."""
    payload = json.dumps(position, separators=(",", ":")).encode()
    return _text(_sum(kind, filters_digest, payload) + payload)


def decode_resume(token: str, kind: str, filters_digest: bytes) -> Position | None:
    """Return where a stream was broken; None for an empty token, a stream from its start.

    Raises:
        InvalidInput: the token is damaged, not ours, or of another stream (RESUME_TOKEN_INVALID).
    """
    position = _position(token, kind, filters_digest) if token else None
    if token and position is None:
        raise InvalidInput.field(
            "resume_token",
            "is not a token of this stream; pass the last one that it gave, or none to start over",
            reason="RESUME_TOKEN_INVALID",
        )
    return position


def decode(token: str, kind: str, filters_digest: bytes, start: P) -> P:
    """Return the position in a token of `encode`; `start` for an empty token, the first page.

    The sum finds mistakes; it is no secret, and need not be: a position only says where to go on
    among the rows that the caller may see anyway.

    Raises:
        InvalidInput: the token is damaged, not ours, or of another query (PAGE_TOKEN_INVALID).
    """
    if not token:
        return start
    position = _position(token, kind, filters_digest)
    if position is None or list(map(type, position)) != list(map(type, start)):
        raise InvalidInput.field(
            "page_token",
            "is not a token of this list with these filters; "
            "pass next_page_token of the last answer with the same filters, or none to start over",
            reason="PAGE_TOKEN_INVALID",
        )
    return cast(P, position)


def _position(token: str, kind: str, filters_digest: bytes) -> Position | None:
    if len(token) > _MAX_TOKEN:
        return None
    try:
        raw = base64.urlsafe_b64decode(token.encode("ascii") + b"=" * (-len(token) % 4))
    except ValueError:  # no ASCII, or no base64
        return None
    payload = raw[_SUM_BYTES:]
    # The decoder skips strange characters and ignores spare bits: only the one spelling is ours.
    if _text(raw) != token or raw[:_SUM_BYTES] != _sum(kind, filters_digest, payload):
        return None
    return tuple(json.loads(payload))


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _sum(kind: str, filters_digest: bytes, payload: bytes) -> bytes:
    head = json.dumps([kind, filters_digest.hex()]).encode()
    return hashlib.blake2b(head + payload, digest_size=_SUM_BYTES, person=b"outbox.page").digest()
