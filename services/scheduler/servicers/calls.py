"""What several methods need: the user to act for, and the field that an error is about."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import grpc

from outbox_server.shared.callers import (
    CallerKind,
    current_caller,
    effective_user,
    require_user,
)
from outbox_server.shared.errors import InvalidInput

# In quotes, because grpcio's class is generic only in its stubs.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


def acting_user(requested: str, field: str = "user_id") -> str | None:
    """Return the user to act for. None means any user: the caller may act for all.

    Raises:
        PermissionDenied: USER_MISMATCH.
        InvalidInput: USER_ID_INVALID.
    """
    return effective_user(current_caller(), requested, field)


def named_user(requested: str) -> str:
    """Return the user to act for. The call needs one user.

    Raises:
        PermissionDenied: USER_MISMATCH.
        InvalidInput: USER_ID_INVALID, USER_ID_REQUIRED.
    """
    return require_user(current_caller(), requested)


def listed_user(requested: str, *, narrowed: bool) -> str | None:
    """Return the user whose rows are listed. None means any user.

    A list of all users' rows is for operators, unless it is `narrowed` to a resource of one user.

    Raises:
        PermissionDenied: USER_MISMATCH.
        InvalidInput: USER_ID_INVALID, USER_ID_REQUIRED.
    """
    if narrowed or current_caller().kind is CallerKind.OPERATOR:
        return acting_user(requested)
    return named_user(requested)


@contextmanager
def errors_name(field: str) -> Iterator[None]:
    """Add the field of the request to errors that name only a row or a byte of the payload."""
    try:
        yield
    except InvalidInput as error:
        if error.violations:
            raise
        raise error.about(field) from None
