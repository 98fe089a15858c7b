"""The keys of users and of SMTP endpoints in Redis, the same for every process."""

from __future__ import annotations

import hmac
from hashlib import blake2s
from typing import Final

from cachetools import LRUCache

from outbox_server.shared.errors import FailedPrecondition
from outbox_server.shared.secrets import SecretBox

# The relay of OUTBOX_SMTP_URL, which all users share. It is a constant, so that a scheduler need
# not know the URL. The circuit scripts also use this name.
RELAY: Final = "relay"
_PURPOSE: Final = b"outbox circuits"
# The number of passwords whose digest is kept. A head is loaded far more often than its password
# changes.
_KEPT_DIGESTS: Final = 10_000


def user_key(user_id: str) -> str:
    """Return the key of a user: a short hash, since a user id may be of any length."""
    return blake2s(user_id.encode(), digest_size=8, person=b"user").hexdigest()


def shard_key(user_id: str) -> int:
    """Return the number that decides the shard of senders that share limits of their user."""
    return int(user_key(user_id)[:15], 16)


def relay_key(user_id: str) -> str:
    """Return the relay's key for the mail of one user.

    Failures that the user's mail may have caused count only for this key.
    """
    return f"{RELAY}:{user_key(user_id)}"


class CircuitKeys:
    """Computes the keys of senders' endpoints from what PostgreSQL stores.

    `override` (OUTBOX_SMTP_OVERRIDE) means that all mail goes to the relay.
    """

    def __init__(self, secrets: SecretBox, *, override: bool) -> None:
        self._secrets = secrets
        self._secret = secrets.derive_key(_PURPOSE)
        self._override = override
        # The keys are encrypted passwords, so that no password is kept in memory.
        self._digests: LRUCache[bytes, str] = LRUCache(_KEPT_DIGESTS)

    def of_sender(
        self,
        user_id: str,
        host: str | None,
        port: int | None,
        security: int | None,
        username: str | None,
        *,
        password: bytes | None,
        oauth2_credentials_id: int | None,
    ) -> str:
        """Return the key of a sender's endpoint. `password` is encrypted.

        The user and the credentials are part of the key. So a user who names another user's server
        and account, or a wrong password, has a circuit, connections and learned limits of its own.
        A new password gives a new key. Senders of one user with the same account and password have
        one key. OAuth 2.0 credentials belong to one sender, so its key is its own.
        """
        if self._override or host is None or port is None:
            return relay_key(user_id)
        credentials = f"oauth2 {oauth2_credentials_id or ''}"
        if password is not None:
            credentials = self._digest(password)
        account = (user_id, host.lower(), str(port), str(int(security or 0)), username or "")
        return blake2s("\0".join((*account, credentials)).encode(), digest_size=12).hexdigest()

    def _digest(self, encrypted: bytes) -> str:
        """Return a keyed digest of a password, so that nobody without the key can test a guess."""
        digest = self._digests.get(encrypted)
        if digest is None:
            try:
                text = self._secrets.decrypt(encrypted).encode()
            except FailedPrecondition:
                # Nothing can be sent with it. The key only has to differ from other keys.
                text = encrypted
            # Without an encryption key, no password can be decrypted: there is no secret to keep.
            digest = hmac.digest(self._secret or _PURPOSE, text, "sha256").hex()
            self._digests[encrypted] = digest
        return digest
