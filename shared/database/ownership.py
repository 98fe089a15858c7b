"""Whose rows a statement sees: the one place that bounds what a call reads and changes.

A method cannot forget it. Every statement of a call goes through `refuse_unbounded`, which lets
none pass before `owned_by` or `owner_of` has bound the call to its user; and those take no other
user than the one that the interceptor found. A method that forgets fails at its first statement,
for every caller, and so in its first test.
"""

from __future__ import annotations

from typing import Any, Protocol, Self, TypeVar

from sqlalchemy import ColumnExpressionArgument, SQLColumnExpression, event
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.shared.callers import call_under_way


class _Narrowable(Protocol):
    def where(self, *whereclause: ColumnExpressionArgument[bool]) -> Self: ...


S = TypeVar("S", bound=_Narrowable)


def owned_by(statement: S, owner: SQLColumnExpression[Any], user_id: str | None) -> S:
    """Return the statement, narrowed to rows whose `owner` is this user; None: of any user.

    Raises:
        AssertionError: the call under way is another user's.
    """
    _bind(user_id)
    return statement if user_id is None else statement.where(owner == user_id)


def owner_of(user_id: str) -> str:
    """Return the user that a new row will belong to, or whose rows are asked for by name.

    Raises:
        AssertionError: the call under way is another user's.
    """
    _bind(user_id)
    return user_id


def _bind(user_id: str | None) -> None:
    call = call_under_way()
    if call is None:
        return
    if call.caller.user_id is not None and call.caller.user_id != user_id:
        raise AssertionError("a statement asks for rows of another user than the caller")
    call.bounded = True


def refuse_unbounded(engine: AsyncEngine) -> None:
    """Let no statement of a call reach the database before the call is bound to its user.

    What runs outside of calls (folding, healing, the look-up of keys) is not asked. What calls
    share must be started outside of them: a task belongs to the call that starts it.
    """
    event.listen(engine.sync_engine, "before_execute", _check)


def _check(*_: object) -> None:
    call = call_under_way()
    if call is not None and not call.bounded:
        raise AssertionError(
            "a statement of a call that is not bound to its user: narrow the first one by "
            "outbox_server.shared.database.ownership.owned_by"
        )
