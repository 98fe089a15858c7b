"""Mail addresses in the form that SMTP commands use."""

from __future__ import annotations

import re
from typing import Final

from email_validator import EmailNotValidError, validate_email

from outbox_server.shared.address_faults import address_fault

# It has no character that could end the address or the command, or begin another address.
_SAFE_ADDRESS: Final = re.compile(
    r'[^\s\x00-\x20\x7f()<>\[\]:;@\\,"]+@[^\s\x00-\x20\x7f()<>\[\]:;@\\,"]+'
)


def envelope_address(address: str) -> str:
    """Return the form of `address` for SMTP: its domain as Punycode if its local part is ASCII.

    An address with a local part beyond ASCII keeps its domain in Unicode; it needs SMTPUTF8.

    Raises:
        ValueError: it is not a mail address.
    """
    if not _SAFE_ADDRESS.fullmatch(address):
        raise ValueError(f"{address!r} is not a mail address")
    if address.isascii():
        return address
    try:
        checked = validate_email(address, check_deliverability=False)
    except EmailNotValidError:
        raise ValueError(f"{address!r} {address_fault(address)}") from None
    return checked.ascii_email or checked.normalized
