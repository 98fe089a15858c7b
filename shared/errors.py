"""All errors that a caller may see: one class per kind, and a stable reason in each instance.

Domain code raises these without knowing gRPC. `shared.rpc.errors` maps them to a status code and
`google.rpc` details (AIP-193). Any other exception becomes INTERNAL, without its text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")
D = TypeVar("D")


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One wrong field: its path in the request (`smtp.port`), and what would be right."""

    field: str
    description: str


class OutboxError(Exception):
    """Base class of all errors that are shown to callers.

    `reason` is UPPER_SNAKE_CASE and never changes. `metadata` has the values of the text in a form
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
    """The request is wrong, regardless of the state of the system (INVALID_ARGUMENT)."""

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
        """Return an error about one field; the message is `field: description`."""
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


class Violations:
    """Collects the errors about several fields, so that a caller learns all of them at once.

    Each check runs in a `with` block of its own; `raise_any` then raises one error for all. An id
    that is not in the form of one hides no wrong field: it is reported if nothing else is wrong.
    """

    def __init__(self) -> None:
        self._found: list[InvalidInput] = []
        self._missing: NotFound | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        # The errors lose their frames, which refer to the request and to this object.
        if isinstance(error, NotFound):
            self._missing = self._missing or error.with_traceback(None)
            return True
        if not isinstance(error, InvalidInput):
            return False
        self._found.append(error.with_traceback(None))
        return True

    def value(self, check: Callable[[], T], default: D) -> T | D:
        """Return what `check` returns; `default` if it raises an error, which is collected."""
        with self:
            return check()
        return default

    def raise_any(self) -> None:
        """Raise the first error, with the violations of all.

        Raises:
            InvalidInput: there was an error.
            NotFound: there was no other error than that.
        """
        if not self._found:
            if self._missing is not None:
                raise self._missing
            return
        first, *others = self._found
        if not others:
            raise first
        message = first.message + "".join(f"; {one.message}" for one in others)
        violations = [violation for one in self._found for violation in one.violations]
        raise InvalidInput(
            message, reason=first.reason, violations=violations, metadata=first.metadata
        )


class NotFound(OutboxError):
    """The resource does not exist or belongs to another user, indistinguishably (NOT_FOUND)."""

    default_reason = "NOT_FOUND"


class AlreadyExists(OutboxError):
    """The id is used already, such as a `request_id` with another payload (ALREADY_EXISTS)."""

    default_reason = "ALREADY_EXISTS"


class Aborted(OutboxError):
    """Somebody else has changed the resource since the caller has read it (ABORTED)."""

    default_reason = "ABORTED"


class FailedPrecondition(OutboxError):
    """The request is valid, but not in the current state, such as a cancel that is too late."""

    default_reason = "FAILED_PRECONDITION"


class Unauthenticated(OutboxError):
    """The credentials of the caller are missing or not valid (UNAUTHENTICATED)."""

    default_reason = "UNAUTHENTICATED"


class PermissionDenied(OutboxError):
    """The caller is authenticated, but may not do this (PERMISSION_DENIED)."""

    default_reason = "PERMISSION_DENIED"


class _Transient(OutboxError):
    """An error that may disappear if the caller tries again later; carries RetryInfo."""

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
    """A limit of the server or of the caller's share is reached (RESOURCE_EXHAUSTED)."""

    default_reason = "RESOURCE_EXHAUSTED"


class Unavailable(_Transient):
    """A dependency cannot be reached; nothing was changed, try again (UNAVAILABLE)."""

    default_reason = "UNAVAILABLE"


class ConfigurationError(OutboxError):
    """A setting is wrong, so the process must not start. The text says what would be right."""

    default_reason = "CONFIGURATION"


def leaves(error: BaseException) -> Iterator[BaseException]:
    """Yield the errors of a group and of the groups in it, or an error that is no group."""
    if isinstance(error, BaseExceptionGroup):
        for member in error.exceptions:
            yield from leaves(member)
    else:
        yield error
