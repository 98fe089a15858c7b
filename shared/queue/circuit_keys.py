"""The key of an SMTP endpoint in Redis, the same for every process."""

from __future__ import annotations

from hashlib import blake2s

# The key of the relay of OUTBOX_SMTP_URL. A constant, so that a scheduler need not know the URL.
RELAY = "relay"


def circuit_key(
    user_id: str,
    host: str | None,
    port: int | None,
    security: int | None,
    username: str | None,
    *,
    override: bool,
) -> str:
    """Return the key of a sender's endpoint: a short hash, or `RELAY`.

    The user is part of the key. So a user who names another user's host and user name with a wrong
    password opens only a circuit of their own. The password is not part of it, because it is stored
    in one place only. `override` (OUTBOX_SMTP_OVERRIDE) means that all mail goes to the relay.
    """
    if override or host is None or port is None:
        return RELAY
    text = "\0".join((user_id, host.lower(), str(port), str(int(security or 0)), username or ""))
    return blake2s(text.encode(), digest_size=8).hexdigest()
