"""The name by which an SMTP endpoint is known in Redis, the same for every process."""

from __future__ import annotations

from hashlib import blake2s

# The relay of OUTBOX_SMTP_URL, whatever that is: a scheduler need not know it.
RELAY = "relay"


def endpoint_of(
    host: str | None,
    port: int | None,
    security: int | None,
    username: str | None,
    *,
    override: bool,
) -> str:
    """Return the endpoint of a sender with these columns: a short hash, or `RELAY`.

    Not of the password, which is in no other place than its own. `override`: everything goes to
    the relay (OUTBOX_SMTP_OVERRIDE).
    """
    if override or host is None or port is None:
        return RELAY
    text = "\0".join((host.lower(), str(port), str(int(security or 0)), username or ""))
    return blake2s(text.encode(), digest_size=8).hexdigest()
