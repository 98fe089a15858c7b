"""Encrypts SMTP passwords for storage, as Fernet tokens with the keys of OUTBOX_ENCRYPTION_KEYS."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from outbox_server.shared.errors import ConfigurationError, FailedPrecondition
from outbox_server.shared.settings import Settings

_HOW_TO_MAKE_A_KEY = "make a key with `outbox keys generate-encryption-key`"


def generate_key() -> str:
    """Return a new key for OUTBOX_ENCRYPTION_KEYS: 32 random bytes, base64url."""
    return Fernet.generate_key().decode()


class SecretBox:
    """Encrypts with the first key and decrypts with any key, so that keys can be rotated."""

    def __init__(self, keys: Sequence[str] = ()) -> None:
        """Take the keys, the newest first. Without keys, every use is refused.

        Raises:
            ConfigurationError: a key is malformed; the text has its number, not the key.
        """
        fernets = [_fernet(number, key) for number, key in enumerate(keys, start=1)]
        self._newest = fernets[0] if fernets else None
        self._fernet = MultiFernet(fernets) if fernets else None
        # The number of different keys.
        self.key_count = len(set(keys))
        self._oldest = keys[-1].encode() if keys else b""

    @classmethod
    def from_settings(cls, settings: Settings) -> SecretBox:
        """Take the keys of OUTBOX_ENCRYPTION_KEYS.

        Raises:
            ConfigurationError: one of them is malformed.
        """
        keys = settings.encryption_keys.get_secret_value().split(",")
        return cls([key.strip() for key in keys if key.strip()])

    def derive_key(self, purpose: bytes) -> bytes:
        """Return a key for keyed hashes, 32 bytes; empty without encryption keys.

        It is derived from the oldest key. So the derived key does not change when a key is added,
        but when the oldest key is removed.
        """
        return self._oldest and blake2b(purpose, key=self._oldest, digest_size=32).digest()

    def encrypt(self, text: str) -> bytes:
        """Return the Fernet token of `text`.

        Raises:
            FailedPrecondition: there is no key (ENCRYPTION_NOT_CONFIGURED).
        """
        return self._configured().encrypt(text.encode())

    def decrypt(self, token: bytes) -> str:
        """Return the text of a token (the reverse of `encrypt`).

        Raises:
            FailedPrecondition: there is no key (ENCRYPTION_NOT_CONFIGURED), or the token is of
                another key (DECRYPTION_FAILED).
        """
        try:
            return self._configured().decrypt(token).decode()
        except InvalidToken:
            raise _undecryptable() from None

    def rotate(self, token: bytes) -> bytes | None:
        """Return the token encrypted with the newest key; None if it already is.

        Raises:
            FailedPrecondition: ENCRYPTION_NOT_CONFIGURED, DECRYPTION_FAILED, as `decrypt`.
        """
        fernet = self._configured()
        if self._newest is not None:
            try:
                self._newest.decrypt(token)
            except InvalidToken:
                pass
            else:
                return None
        try:
            return fernet.rotate(token)
        except InvalidToken:
            raise _undecryptable() from None

    def _configured(self) -> MultiFernet:
        if self._fernet is None:
            raise FailedPrecondition(
                f"passwords are stored only encrypted, and OUTBOX_ENCRYPTION_KEYS is not set; "
                f"{_HOW_TO_MAKE_A_KEY}",
                reason="ENCRYPTION_NOT_CONFIGURED",
            )
        return self._fernet


def _undecryptable() -> FailedPrecondition:
    return FailedPrecondition(
        "no key of OUTBOX_ENCRYPTION_KEYS decrypts the stored password; "
        "add the key that it was encrypted with, or store the password again",
        reason="DECRYPTION_FAILED",
    )


def _fernet(number: int, key: str) -> Fernet:
    try:
        return Fernet(key)
    except ValueError:
        raise ConfigurationError(
            f"OUTBOX_ENCRYPTION_KEYS: key {number} is not a Fernet key (32 bytes in base64url); "
            f"{_HOW_TO_MAKE_A_KEY}"
        ) from None
