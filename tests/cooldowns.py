"""Stores a cooldown of a sender as a dispatcher does."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

MESSAGE: Final = "5.4.5 Daily user sending limit exceeded"
REPLY: Final = f"550 {MESSAGE}"
# Its parameters are those that `row_for` returns.
INSERT: Final = (
    "INSERT INTO cooldowns (sender_id, since, next_probe_at, refusals, smtp_code, enhanced_code,"
    " message) VALUES (%s, now() - interval '2 min', now() + %s, 2, 550, '5.4.5', %s)"
)


def row_for(
    sender: int | str, *, probe_in: timedelta = timedelta(hours=1), message: str = MESSAGE
) -> tuple[int, timedelta, str]:
    """Return the parameters of the INSERT statement."""
    return int(sender), probe_in, message


def begin(execute: Callable[..., Any], sender: int | str, **changes: Any) -> Any:
    """Begin a cooldown with `execute(statement, *parameters)`; Redis is not changed."""
    return execute(INSERT, *row_for(sender, **changes))
