"""The domains whose addresses a user may use as From (OUTBOX_SENDER_POLICY=domains). Pure.

`example.com` means that domain only. `*.example.com` means every domain below it, but not
`example.com` itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import idna

from outbox_server.shared.errors import PermissionDenied
from outbox_server.shared.quoting import quoted

_WILDCARD: Final = "*."
_LONGEST: Final = 253


def normalise_domain(text: str) -> str:
    """Return a domain, or a wildcard, in the form in which domains are compared.

    That is lower case, with international names in ASCII (IDNA 2008, RFC 5891).

    Raises:
        ValueError: it is not a domain; the text says what is wrong.
    """
    shown = quoted(text)
    # Checked first, because normalising a long text is slow.
    if len(text) > _LONGEST:
        raise ValueError(f"{shown} is longer than {_LONGEST} characters")
    wildcard = _WILDCARD if text.startswith(_WILDCARD) else ""
    name = text.removeprefix(_WILDCARD)
    try:
        encoded = idna.encode(name, uts46=True, std3_rules=True).decode("ascii").lower()
    except (idna.IDNAError, UnicodeError):
        encoded = ""
    if "." not in encoded.strip(".") or encoded.endswith(".") or encoded.startswith("."):
        raise ValueError(f"{shown} is not a domain; write example.com, or *.example.com")
    return wildcard + encoded


def check_sender_domain(address: str, allowed: Iterable[str], user_id: str) -> None:
    """Check that an address is in one of the domains of a user, which are normalised.

    Raises:
        PermissionDenied: SENDER_DOMAIN_NOT_ALLOWED.
    """
    shown = address.rpartition("@")[2]
    try:
        domain = normalise_domain(shown)
    except ValueError:
        domain = ""  # such as an address literal, which cannot be assigned
    permitted = frozenset(allowed)
    labels = domain.split(".")
    parents = (_WILDCARD + ".".join(labels[n:]) for n in range(1, len(labels)))
    if domain and (domain in permitted or not permitted.isdisjoint(parents)):
        return
    raise PermissionDenied(
        f"the user {user_id} may not send from {shown}: the operator has not assigned this domain "
        "to the user",
        reason="SENDER_DOMAIN_NOT_ALLOWED",
        metadata={"user": user_id, "domain": shown},
    )
