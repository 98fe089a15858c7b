"""API keys: what one looks like, and what of it is stored. Pure.

A key is `obx_<key id>_<secret>`. The id is public: it finds the row, and names the key in lists and
logs. The secret is 256 random bits, of which only the SHA-256 is stored. A slow hash (bcrypt,
Argon2) protects what people make up and others can guess; nobody guesses 2^256 values, however fast
they are tried, and a fast hash costs no call more than a microsecond.
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
_KEY: Final = re.compile(rf"{PREFIX}_([{_ID_ALPHABET}]{{{_ID_LENGTH}}})_([A-Za-z0-9_-]{{43}})")


class ApiKeyKind(IntEnum):
    """Whom a key acts for, as it is stored."""

    # One user, and nobody else.
    USER = 1
    # Any user: another backend.
    SERVICE = 2
    # Any user, and the operator's own methods.
    OPERATOR = 3


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as it is stored. `user_id` is set for kind USER, and for no other."""

    key_id: str
    kind: ApiKeyKind
    user_id: str | None
    name: str
    created_at: datetime
    last_used_at: datetime | None
    revoked_at: datetime | None


@dataclass(frozen=True, slots=True)
class PresentedKey:
    """What a caller showed: which key it claims to be, and the hash of the secret."""

    key_id: str
    secret_hash: bytes

    def proves(self, stored_hash: bytes) -> bool:
        """Say whether it is the key that was stored, in a time that tells nothing of it."""
        return hmac.compare_digest(self.secret_hash, stored_hash)


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that was just made: `text` is shown once, and kept nowhere."""

    key_id: str
    text: str
    secret_hash: bytes


def make_key() -> NewKey:
    """Return a new random key."""
    key_id = "".join(secrets.choice(_ID_ALPHABET) for _ in range(_ID_LENGTH))
    secret = secrets.token_urlsafe(_SECRET_BYTES)
    return NewKey(key_id, f"{PREFIX}_{key_id}_{secret}", _hash(secret))


def read_key(text: str) -> PresentedKey | None:
    """Return what `text` presents; None: it is no key."""
    found = _KEY.fullmatch(text)
    return None if found is None else PresentedKey(found[1], _hash(found[2]))


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("ascii")).digest()
