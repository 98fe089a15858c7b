"""Conditions on the key space of Redis that the stored settings name (`shared.agreed`).

Processes that still work with earlier settings use another one. Before the first process has stored
its settings, the key space is the empty name.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import ColumnElement, Text, bindparam, func, select

from outbox_server.shared.database.models import AgreedSettingsRow

PARAMETER: Final = "key_space"


def _is_named(stored: Any) -> ColumnElement[bool]:
    named: ColumnElement[bool] = func.coalesce(stored.scalar_subquery(), "") == bindparam(
        PARAMETER, type_=Text
    )
    return named


def is_key_space() -> ColumnElement[bool]:
    """Return the condition that the parameter `key_space` is the stored one."""
    return _is_named(select(AgreedSettingsRow.key_space))


def is_locked_key_space() -> ColumnElement[bool]:
    """Return the same condition, which stays true until the end of the transaction.

    If it waits for a change, it sees that change even with an older snapshot.
    """
    locked = select(AgreedSettingsRow.key_space).with_for_update(read=True).cte("agreed")
    return _is_named(select(locked.c.key_space))
