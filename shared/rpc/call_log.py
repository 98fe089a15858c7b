"""The log line of a call: who called what, for how long, and how it ended."""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import grpc
from google.rpc.status_pb2 import Status
from structlog.contextvars import bind_contextvars

from outbox_server.shared.callers import Caller, call_under_way
from outbox_server.shared.rpc.errors import INTERNAL_REASON, error_info

# Fields of requests that log lines have, by the names that they have there.
_IDS: Final = {"batch_id": "batch_id", "email_job_id": "job_id"}
_MAX_ID_DIGITS: Final = 19
_REQUEST_ID: Final = "x-request-id"
# The longest text of a caller in a log line. A user id has at most this length.
_MAX_LOGGED: Final = 128
_NAMES: Final = {code.value[0]: code.name for code in grpc.StatusCode}

# grpcio's classes are generic in their stubs only.
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class CallLog:
    """Writes the log line of a call."""

    def __init__(self, log: Any, method: str, context: _Context, *, quiet: bool) -> None:
        self._log = log
        self._method = method
        self._peer = context.peer()  # not available any more when the caller has left
        self._quiet = quiet
        self._request_id = _request_id(context)
        self._fields: dict[str, str] = {}
        self.caller: Caller | None = None
        self.code = grpc.StatusCode.OK.name

    def failed(self, status: Status, error: BaseException) -> None:
        """Record how the call failed, and log the trace of an unexpected error."""
        info = error_info(status)
        self.code = _NAMES[status.code]
        self._fields["reason"] = info.reason
        if info.reason == INTERNAL_REASON:
            self._log.error(
                "unexpected error",
                method=self._method,
                incident=info.metadata["incident"],
                exc_info=error,
            )

    def write(self, seconds: float) -> None:
        """Write the line, at level debug for health checks and reflection.

        `user_id` is the user that the call acts for, `key_id` names the API key, and `x_request_id`
        is the caller's own id in the metadata. The `request_id` of a batch is in the context.
        """
        call = call_under_way()
        caller = self.caller
        user = caller.user_id if caller else None
        if call is not None and call.user_id:
            user = call.user_id
        known = {
            "user_id": user,
            "key_id": caller and caller.key_id,
            "x_request_id": self._request_id,
        }
        (self._log.debug if self._quiet else self._log.info)(
            "call",
            method=loggable(self._method),
            code=self.code,
            milliseconds=round(seconds * 1000, 1),
            peer=self._peer,
            **{name: loggable(value) for name, value in known.items() if value},
            **self._fields,
        )


def bind_ids(message: Any) -> None:
    """Let the log lines of the call have the ids that its request names.

    Only texts that can be ids are logged. Each call runs in a task of its own.
    """
    for field, name in _IDS.items():
        value = getattr(message, field, "")
        if value and len(value) <= _MAX_ID_DIGITS and value.isdecimal():
            bind_contextvars(**{name: int(value)})


def loggable(text: str) -> str:
    """Return a text of a caller as log lines have it: shortened, without control characters."""
    shown = text[:_MAX_LOGGED]
    escaped = shown if shown.isprintable() else repr(shown)[1:-1]
    return escaped if len(text) <= _MAX_LOGGED else f"{escaped}..."


def _request_id(context: _Context) -> str:
    """Return the caller's own id of the call: `x-request-id` in the metadata; "" if none is set."""
    for name, value in context.invocation_metadata() or ():
        if name == _REQUEST_ID:
            return value.decode("ascii", "replace") if isinstance(value, bytes) else value
    return ""
