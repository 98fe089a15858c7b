"""The format of API keys, and the part of them that is stored. Pure.

A key is `obx_<key id>_<secret>`. The id is public: it finds the row, and names the key in lists and
logs. The secret is 256 random bits, of which only the SHA-256 is stored. A slow hash (bcrypt,
Argon2) protects passwords that can be guessed. 256 random bits cannot be guessed, and a fast hash
costs a call no more than a microsecond.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from typing import Final

PREFIX: Final = "obx"
_ID_ALPHABET: Final = "abcdefghijkmnpqrstuvwxyz23456789"
_ID_LENGTH: Final = 10
_SECRET_BYTES: Final = 32
_KEY_ID: Final = re.compile(rf"[{_ID_ALPHABET}]{{{_ID_LENGTH}}}")
_KEY: Final = re.compile(rf"{PREFIX}_([{_ID_ALPHABET}]{{{_ID_LENGTH}}})_([A-Za-z0-9_-]{{43}})")


class ApiKeyKind(IntEnum):
    """The kinds of keys, which differ in the users that they act for, as stored."""

    # Acts for one user only.
    USER = 1
    # Another backend; acts for any user.
    SERVICE = 2
    # Acts for any user, and may call the operator's own methods.
    OPERATOR = 3


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as it is stored. `user_id` is set for kind USER only."""

    key_id: str
    kind: ApiKeyKind
    user_id: str | None
    name: str
    created_at: datetime
    last_used_at: datetime | None
    revoked_at: datetime | None
    # None means never.
    expires_at: datetime | None = None
    # May call only methods that change nothing.
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class PresentedKey:
    """A key that a caller sent: its id, and the hash of its secret."""

    key_id: str
    secret_hash: bytes

    def proves(self, stored_hash: bytes) -> bool:
        """Return whether it is the stored key, with a comparison in constant time."""
        return hmac.compare_digest(self.secret_hash, stored_hash)


@dataclass(frozen=True, slots=True)
class NewKey(PresentedKey):
    """A new key. `text` is shown once and stored nowhere."""

    text: str


def make_key() -> NewKey:
    """Return a new random key."""
    key_id = "".join(secrets.choice(_ID_ALPHABET) for _ in range(_ID_LENGTH))
    secret = secrets.token_urlsafe(_SECRET_BYTES)
    return NewKey(key_id, _hash(secret), f"{PREFIX}_{key_id}_{secret}")


def is_key_id(text: str) -> bool:
    """Return whether `text` has the form of the id of a key."""
    return _KEY_ID.fullmatch(text) is not None


def read_key(text: str) -> PresentedKey | None:
    """Return the key in `text`; None if `text` is not a key."""
    found = _KEY.fullmatch(text)
    return None if found is None else PresentedKey(found[1], _hash(found[2]))


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("ascii")).digest()
