"""Restricts the statements of a call to the rows of its user (tenant isolation).

A method cannot forget the restriction. `refuse_unbounded` checks every statement of a call, and
refuses it unless `owned_by` or `owner_of` has bound the call to its user. Those accept only the
user that the interceptor authenticated. A method that does not call them fails at its first
statement, for every caller, and so in its first test.
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
    """Return the statement, restricted to rows whose `owner` is this user. None means any user.

    Raises:
        AssertionError: the current call belongs to another user.
    """
    _bind(user_id)
    return statement if user_id is None else statement.where(owner == user_id)


def owner_of(user_id: str) -> str:
    """Return the user that a new row will belong to, or whose rows a statement names.

    Raises:
        AssertionError: the current call belongs to another user.
    """
    _bind(user_id)
    return user_id


def bind_call(user_id: str | None) -> None:
    """Bind the current call to its user. None means any user: the caller may act for all.

    For statements that name the user in a key of their own.

    Raises:
        AssertionError: the current call belongs to another user.
    """
    _bind(user_id)


def _bind(user_id: str | None) -> None:
    call = call_under_way()
    if call is None:
        return
    if call.caller.user_id is not None and call.caller.user_id != user_id:
        raise AssertionError("a statement uses rows of another user than the caller")
    call.bounded = True


def refuse_unbounded(engine: AsyncEngine) -> None:
    """Refuse every statement of a call that is not bound to its user yet.

    Work outside of calls (folding, recovery, the look-up of keys) is not checked. Tasks that calls
    share must be started outside of calls: a task belongs to the call that starts it.
    """
    event.listen(engine.sync_engine, "before_execute", _check)


def _check(*_: object) -> None:
    call = call_under_way()
    if call is not None and not call.bounded:
        raise AssertionError(
            "this call is not bound to its user: restrict its first statement with "
            "outbox_server.shared.database.ownership.owned_by"
        )
