"""The name by which an SMTP endpoint is known in Redis, the same for every process."""

from __future__ import annotations

from hashlib import blake2s

# The relay of OUTBOX_SMTP_URL, whatever that is: a scheduler need not know it.
RELAY = "relay"


def endpoint_of(
    user_id: str,
    host: str | None,
    port: int | None,
    security: int | None,
    username: str | None,
    *,
    override: bool,
) -> str:
    """Return the endpoint of a sender with these columns: a short hash, or `RELAY`.

    The user is part of it: who names another user's host and user name with a wrong password opens
    no circuit but his own. The password is not: it is kept in one place only. `override` means that
    everything goes to the relay (OUTBOX_SMTP_OVERRIDE).
    """
    if override or host is None or port is None:
        return RELAY
    text = "\0".join((user_id, host.lower(), str(port), str(int(security or 0)), username or ""))
    return blake2s(text.encode(), digest_size=8).hexdigest()
