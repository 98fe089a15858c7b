"""The hash that replaces the address of an erased person in the table of suppressions.

A suppression must outlive the erasure of the address, or the person would get mail again. It is
SHA-256 over the key of the installation, the user and the address, so that two users' suppressions
of one person differ. The key is stored in the same database: whoever has a copy of it can test a
guess of an address, but cannot read the address.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import ColumnElement, Text, cast, func, literal, select

from outbox_server.shared.database.models import ErasureKey

# Hashes begin with this. No hash equals an address, because an address has an @.
ERASED_PREFIX: Final = "erased:"


def erased_key(user_id: Any, address: Any) -> ColumnElement[str]:
    """Return the hash of a case-folded address; NULL if this installation has erased nobody."""
    key = select(ErasureKey.key).scalar_subquery()
    # A user id has no line break.
    parts = cast(key, Text) + cast(user_id, Text) + literal("\n", Text) + cast(address, Text)
    digest = func.encode(func.sha256(func.convert_to(parts, "UTF8")), "hex")
    return literal(ERASED_PREFIX, Text) + cast(digest, Text)
