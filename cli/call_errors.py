"""Says in one line what is wrong after a failed call, and why no server answered."""

from __future__ import annotations

import re
from typing import Any, Final

from outbox_client import (
    AlreadyExists,
    CallError,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Tls,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)

from outbox_server.cli.addresses import Address
from outbox_server.cli.connection_check import (
    SERVERS,
    Target,
    which_server,
    why_no_answer,
    why_no_connection,
)
from outbox_server.cli.flags import in_flags
from outbox_server.cli.lazy import CommandFailed
from outbox_server.cli.terminal import printable

# Characters.
_MAX_GRPC_MESSAGE: Final = 500
# How gRPC reports the answer of an HTTP/2 server or proxy that is not a gRPC server.
_HTTP_STATUS: Final = re.compile(r"http2 header with status: (\d+)")
# Errors after which nothing has changed and an identical retry would fail as well.
_REFUSALS: Final = (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unauthenticated,
    Unimplemented,
)


def failure_of(error: CallError, address: Address, tls: Tls | None = None) -> CommandFailed:
    """Return the failure of a command whose call failed, with all that the server said."""
    line = describe(error, address, tls)
    fields = [violation.field for violation in error.violations]
    details: dict[str, Any] = {
        "code": error.code.name,
        "reason": error.reason,
        # Only the server's own errors have a reason; of all others the line says more.
        "message": in_flags(error.message, fields) if error.reason else line,
        "violations": [
            {"field": one.field, "description": in_flags(one.description, fields)}
            for one in error.violations
        ],
        "metadata": dict(error.metadata),
    }
    if not error.reason:
        # What gRPC, or a proxy, said: the line explains it, and this shows the cause.
        details["grpc_message"] = error.message[:_MAX_GRPC_MESSAGE]
    if error.retry_delay is not None:
        details["retry_delay"] = f"{error.retry_delay.total_seconds():g}s"
    if error.request_id is not None:
        details["request_id"] = error.request_id
    return CommandFailed(line, details=details)


def describe(error: CallError, address: Address, tls: Tls | None = None) -> str:
    """Return one line: message, reason and field violations, or why no server answered.

    If none answered, this takes some seconds: it connects again to find the cause.
    """
    status = _HTTP_STATUS.search(error.message)
    if isinstance(error, Unimplemented):
        line = _about_unimplemented(error, address, tls)
    elif status is not None and not error.reason:
        line = (
            f"{address} answered with HTTP status {status[1]}, so it is not a {address.title} "
            "but another server, or a proxy that cannot reach Outbox"
        )
    elif isinstance(error, Unavailable) and not error.reason:
        line = _about_no_answer(address, tls)
    elif isinstance(error, DeadlineExceeded):
        target = None if error.reason else _target_of(address, tls)
        line = (target and why_no_connection(target)) or (
            f"no answer in time from {address}: the {address.title} may be overloaded; try again"
        )
    else:
        fields = [violation.field for violation in error.violations]
        line = in_flags(" ".join(str(error).split()), fields)
    if error.request_id and not isinstance(error, _REFUSALS):
        line += (
            f"; the batch may have been accepted: try again with --request-id {error.request_id}"
        )
    return printable(line)


def in_brief(error: CallError, server: str = "") -> str:
    """Return one line at once, without finding the cause, for views that refresh themselves."""
    if isinstance(error, Unavailable | DeadlineExceeded) and not error.reason:
        return f"no answer from {server}" if server else "no answer"
    return printable(" ".join(str(error).split()))


def _about_no_answer(address: Address, tls: Tls | None) -> str:
    target = _target_of(address, tls)
    return f"no answer at {address}: {address.fix}" if target is None else why_no_answer(target)


def _target_of(address: Address, tls: Tls | None) -> Target | None:
    """Return what to connect to, or None for another form of address, such as `unix:`."""
    found = address.host_and_port
    if found is None:
        return None
    return Target(
        *found,
        address.title,
        tls,
        str(address),
        address.fix,
        address.correction,
    )


def _about_unimplemented(error: CallError, address: Address, tls: Tls | None) -> str:
    """Return what is wrong: it is another server, or an older version."""
    actual = which_server(address.target, tls, address.service)
    reason = f" ({error.reason})" if error.reason else ""
    if actual is None:
        return (
            f"{address} is a gRPC server, but not an Outbox {address.title}{reason}: "
            f"{address.correction}"
        )
    if actual != address.service:
        other = SERVERS[actual][0]
        return (
            f"{address} is the {other}, but this command needs the {address.title}{reason}: "
            f"{address.correction}"
        )
    return (
        f"the {address.title} at {address} lacks the method of this command{reason}: "
        "it is an older version; upgrade it"
    )
