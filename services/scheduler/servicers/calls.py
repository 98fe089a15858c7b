"""What all methods need first: the user to act for, and durations from requests."""

from __future__ import annotations

from typing import Any, TypeAlias

import grpc
from google.protobuf.duration_pb2 import Duration

from outbox_server.shared.callers import current_caller, effective_user, require_user
from outbox_server.shared.rpc.proto_mapping import from_duration

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


def whole_ms(duration: Duration, field: str) -> int:
    """Return the duration in ms, rounded up.

    Raises:
        InvalidInput: it is not a valid duration.
    """
    from_duration(duration, field)
    return -(-(duration.seconds * 1_000_000_000 + duration.nanos) // 1_000_000)
