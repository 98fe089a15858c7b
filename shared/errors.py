"""Every error that a caller may see: one class a kind, each instance with a stable reason.

Domain code raises these and knows nothing of gRPC; `shared.rpc.server` maps them to a status code
and `google.rpc` details (AIP-193). Anything else that escapes is INTERNAL, without its text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One bad field: its path in the request (`smtp.port`), and what would be right."""

    field: str
    description: str


class OutboxError(Exception):
    """Base of all errors with a meaning for the caller.

    `reason` is UPPER_SNAKE_CASE and never changes; `metadata` holds the values that the text names,
    for programs (ErrorInfo, AIP-193).
    """

    default_reason = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.metadata = dict(metadata or {})


class InvalidInput(OutboxError):
    """The request is wrong by itself, whatever the state of the system (INVALID_ARGUMENT)."""

    default_reason = "INVALID_INPUT"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        violations: Sequence[FieldViolation] = (),
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, reason=reason, metadata=metadata)
        self.violations = tuple(violations)

    @classmethod
    def field(
        cls,
        field: str,
        description: str,
        *,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> InvalidInput:
        """Return the error of one bad field; the message is `field: description`."""
        return cls(
            f"{field}: {description}",
            reason=reason,
            violations=[FieldViolation(field, description)],
            metadata=metadata,
        )

    def about(self, field: str) -> InvalidInput:
        """Return the same error with the field that it is about."""
        return InvalidInput(
            self.message,
            reason=self.reason,
            violations=[FieldViolation(field, self.message)],
            metadata=self.metadata,
        )


class NotFound(OutboxError):
    """There is no such thing, or it belongs to another user: the caller cannot tell (NOT_FOUND)."""

    default_reason = "NOT_FOUND"


class AlreadyExists(OutboxError):
    """The same identity with another content, such as a used `request_id` (ALREADY_EXISTS)."""

    default_reason = "ALREADY_EXISTS"


class FailedPrecondition(OutboxError):
    """Right in itself, but not in the present state, such as a too late cancel."""

    default_reason = "FAILED_PRECONDITION"


class Unauthenticated(OutboxError):
    """The caller did not say who it is, or not credibly (UNAUTHENTICATED)."""

    default_reason = "UNAUTHENTICATED"


class PermissionDenied(OutboxError):
    """The caller is known and may not do this (PERMISSION_DENIED)."""

    default_reason = "PERMISSION_DENIED"


class _Transient(OutboxError):
    """Something that a later try may not meet; carries RetryInfo."""

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        retry_after: timedelta = timedelta(seconds=1),
    ) -> None:
        super().__init__(message, reason=reason, metadata=metadata)
        self.retry_after = retry_after


class ResourceExhausted(_Transient):
    """More than the server takes at once, or than the caller's share (RESOURCE_EXHAUSTED)."""

    default_reason = "RESOURCE_EXHAUSTED"


class Unavailable(_Transient):
    """A dependency is gone; nothing was changed, try again (UNAVAILABLE)."""

    default_reason = "UNAVAILABLE"


class ConfigurationError(OutboxError):
    """A setting is wrong: the process must not start. Names the variable and what it takes."""

    default_reason = "CONFIGURATION"
