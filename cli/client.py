"""Connects a command to a service: its address, its client, and its errors in one line."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import typer
from google.protobuf.message import Message
from outbox_client import (
    AlreadyExists,
    CallError,
    Client,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    RetryPolicy,
    Tls,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)

from outbox_server.cli.client_options import CONNECTION_PANEL, connection_options
from outbox_server.cli.connection_check import (
    SERVERS,
    Target,
    channel_options,
    which_server,
    why_no_answer,
    why_no_connection,
)
from outbox_server.cli.credentials import credentials_for
from outbox_server.cli.flags import in_flags
from outbox_server.cli.lazy import CommandFailed
from outbox_server.cli.options import Paging
from outbox_server.cli.terminal import printable
from outbox_server.shared.errors import ConfigurationError
from outbox_server.shared.settings import load_settings

ENDPOINTS: Final = Path(".outbox/endpoints.json")
_DEFAULT: Final = "the default"
# The limit of an upload without --timeout, as the client has it.
_UPLOAD_TIMEOUT_S: Final = 3600.0
_LARGEST_PAGE: Final = 1000
# Characters.
_MAX_GRPC_MESSAGE: Final = 500
# A user waits at the terminal: 4 tries within 0.7 s, unless the server asks for longer waits.
_RETRY: Final = RetryPolicy(tries=4)

_Request = TypeVar("_Request", bound=Message)
_Page = TypeVar("_Page", bound=Message)

Server = Annotated[
    str | None,
    typer.Option(
        "--server",
        metavar="HOST:PORT",
        help="Server address.",
        rich_help_panel=CONNECTION_PANEL,
    ),
]


# IPv6 addresses are in brackets.
_HOST_PORT: Final = re.compile(r"(\[[^\[\]]+\]|[^:/\[\]]+):(\d{1,5})")
# Other forms of address that gRPC accepts.
_GRPC_SCHEMES: Final = ("unix:", "dns:", "ipv4:", "ipv6:")
_LAST_PORT: Final = 65535
# How gRPC reports the answer of an HTTP/2 server or proxy that is not a gRPC server.
_HTTP_STATUS: Final = re.compile(r"http2 header with status: (\d+)")


@dataclass(frozen=True, slots=True)
class Address:
    """The address of a service, and the option, variable or file that it comes from."""

    target: str
    origin: str
    service: str
    # The file with an API key for this stack, unless the caller has another key.
    key_file: Path | None = None

    def __str__(self) -> str:
        """Return the address with its origin, as it appears in messages."""
        return f"{self.target} ({self.origin})"

    @property
    def title(self) -> str:
        """The name of the service in a sentence."""
        return SERVERS[self.service][0]

    @property
    def fix(self) -> str:
        """The advice if no server of this service is at the address."""
        start = f"start the {self.title} there"
        if self.origin in (_DEFAULT, str(ENDPOINTS)):
            start = "start `outbox up` in this folder"
        return f"{start}, or {self.correction}"

    @property
    def correction(self) -> str:
        """The advice if the address is wrong."""
        name = self.origin if self.origin.startswith("OUTBOX_") else "--server"
        return f"name the address of the {self.title} with {name}"


def find_address(service: str, server: str | None) -> Address:
    """Return the address of `service`: `scheduler`, `dispatcher` or `stats`.

    The first of these that is set: `server`, OUTBOX_..._LISTEN, the stack of `outbox up` in this
    folder, the default.

    Raises:
        CommandFailed: the file of `outbox up` cannot be read.
        ConfigurationError: a variable is invalid, or the address is not host:port.
    """
    if server:
        return _checked(Address(server, "--server", service))
    settings = load_settings()
    field = f"{service}_listen"
    listen = reachable(getattr(settings, field))
    if field in settings.model_fields_set:
        return _checked(Address(listen, f"OUTBOX_{field.upper()}", service))
    stack = read_endpoints()
    if stack is not None:
        found = stack["dispatchers"][0] if service == "dispatcher" else stack[service]
        return Address(found, str(ENDPOINTS), service, key_file_of(stack))
    return Address(listen, _DEFAULT, service)


def read_endpoints() -> dict[str, Any] | None:
    """Return the addresses that `outbox up` wrote in this folder, or None if it does not run here.

    Raises:
        CommandFailed: the file cannot be read, is not JSON, or belongs to another user.
    """
    try:
        with ENDPOINTS.open(encoding="utf-8") as file:
            owner = os.fstat(file.fileno()).st_uid
            found: dict[str, Any] = json.load(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CommandFailed(f"{ENDPOINTS} cannot be read: {error}") from None
    # In a folder that others may write to, anyone can put such a file.
    if owner not in (os.geteuid(), 0):
        raise CommandFailed(
            f"{ENDPOINTS} belongs to user {owner}, who could redirect this call: use another "
            "folder, or name the server with --server"
        )
    return found


def key_file_of(stack: dict[str, Any]) -> Path | None:
    """Return the file with the operator's API key of a stack; None if its callers need none."""
    return Path(stack["api_key_file"]) if stack.get("api_key_file") else None


def dispatcher_addresses(servers: Sequence[str]) -> list[Address]:
    """Return the addresses of `servers`, or if there are none, of all known dispatchers.

    `outbox up` may run several; OUTBOX_DISPATCHER_LISTEN is the address of one.

    Raises:
        CommandFailed, ConfigurationError: see `find_address`.
    """
    if servers:
        return [find_address("dispatcher", server) for server in servers]
    first = find_address("dispatcher", None)
    if first.origin != str(ENDPOINTS):
        return [first]
    targets = (read_endpoints() or {}).get("dispatchers", [first.target])
    return [replace(first, target=target) for target in targets]


def connection(service: str, server: str | None) -> AbstractContextManager[Client]:
    """Open a client of one service. Errors of its calls become CommandFailed.

    Raises:
        CommandFailed: a call failed. The text is the server's message in one line.
    """
    return connection_to(find_address(service, server))


@contextmanager
def connection_to(address: Address) -> Iterator[Client]:
    """Open a client of the service at an address, like `connection`."""
    credentials = credentials_for(address.target, load_settings(), address.key_file)
    addresses: dict[str, Any] = {address.service: address.target}
    with Client(
        **addresses,
        api_key=credentials.api_key or None,
        tls=credentials.tls,
        timeout=_given_timeout(),
        upload_timeout=upload_timeout(),
        retry=_RETRY,
        options=channel_options(),
    ) as client:
        try:
            yield client
        except CallError as error:
            raise failure_of(error, address, credentials.tls) from None


def upload_timeout() -> float:
    """Return the limit, in seconds, of a call that sends a file."""
    given = _given_timeout()
    return _UPLOAD_TIMEOUT_S if given is None else given


def _given_timeout() -> float | None:
    given = connection_options.get().timeout
    return None if given is None else given.total_seconds()


def pages(
    method: Callable[[_Request], _Page], request: _Request, field: str, paging: Paging
) -> _Page:
    """Return one page of a list or, with `--all`, all pages joined into one."""
    next_request: Any = request
    next_request.page_size = paging.page_size or (_LARGEST_PAGE if paging.everything else 0)
    next_request.page_token = paging.page_token
    page: Any = method(next_request)
    # A page with a filter may be empty although more follow.
    while page.next_page_token and (paging.everything or not getattr(page, field)):
        next_request.page_token = page.next_page_token
        more: Any = method(next_request)
        getattr(page, field).extend(getattr(more, field))
        page.next_page_token = more.next_page_token
    answer: _Page = page
    return answer


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
    found = _HOST_PORT.fullmatch(address.target)
    if found is None:
        return None
    return Target(
        found[1].strip("[]"),
        int(found[2]),
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


def _checked(address: Address) -> Address:
    """Return the address unchanged if it is valid.

    Raises:
        ConfigurationError: the address is not host:port.
    """
    found = _HOST_PORT.fullmatch(address.target)
    if found is not None and 0 < int(found[2]) <= _LAST_PORT:
        return address
    if address.target.startswith(_GRPC_SCHEMES):
        return address
    raise ConfigurationError(
        f"{address.origin}: {address.target!r} is not HOST:PORT, such as 127.0.0.1:50051; "
        "write an IPv6 address in brackets, and leave out http://"
    )


def reachable(listen: str) -> str:
    """Return the address that reaches a local listener: loopback for one on all addresses."""
    host, _, port = listen.rpartition(":")
    loopback = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104 - connected to, not bound
    return f"{loopback.get(host, host)}:{port}" if host else listen
