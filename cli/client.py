"""The way from a command to a service: which address, one client, and errors as one line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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

from outbox_server.cli.connection_check import SERVERS, Target, which_server, why_no_answer
from outbox_server.cli.credentials import credentials_for
from outbox_server.cli.lazy import CommandFailed
from outbox_server.cli.output import printable
from outbox_server.shared.errors import ConfigurationError
from outbox_server.shared.settings import load_settings

ENDPOINTS: Final = Path(".outbox/endpoints.json")
_DEFAULT: Final = "the default"
# Of a call that changes very many rows; what others may take is the client's default.
LONG_TIMEOUT_S: Final = 300.0
_LARGEST_PAGE: Final = 1000
# Someone waits at the terminal: 4 tries within 0.7 s, unless the server asks for more.
_RETRY: Final = RetryPolicy(tries=4)

_Request = TypeVar("_Request", bound=Message)
_Page = TypeVar("_Page", bound=Message)

Server = Annotated[
    str | None,
    typer.Option("--server", metavar="HOST:PORT", help="The service to ask, in place of ours."),
]


# An IPv6 address stands in brackets.
_HOST_PORT: Final = re.compile(r"(\[[^\[\]]+\]|[^:/\[\]]+):(\d{1,5})")
# What gRPC takes beside host:port.
_GRPC_SCHEMES: Final = ("unix:", "dns:", "ipv4:", "ipv6:")
_LAST_PORT: Final = 65535
# An answer of HTTP/2 servers and proxies that are no gRPC servers, as gRPC reports it.
_HTTP_STATUS: Final = re.compile(r"http2 header with status: (\d+)")


@dataclass(frozen=True, slots=True)
class Address:
    """Where a service is asked, and which option, variable or file says that it is there."""

    target: str
    origin: str
    service: str

    def __str__(self) -> str:
        """Return it as messages name it."""
        return f"{self.target} ({self.origin})"

    @property
    def title(self) -> str:
        """The service's name in a sentence."""
        return SERVERS[self.service][0]

    @property
    def fix(self) -> str:
        """What to do where no server of this service is at the address."""
        start = f"start the {self.title} there"
        if self.origin in (_DEFAULT, str(ENDPOINTS)):
            start = "start `outbox up` in this folder"
        name = self.origin if self.origin.startswith("OUTBOX_") else "--server"
        return f"{start}, or name the address of the {self.title} with {name}"


def find_address(service: str, server: str | None) -> Address:
    """Return where to ask `service`: `scheduler`, `dispatcher` or `stats`.

    In this order: `server`; OUTBOX_..._LISTEN, where it is set; the stack of `outbox up` in this
    folder; the default.

    Raises:
        CommandFailed: the stack's file cannot be read.
        ConfigurationError: a variable is wrong, or the address is not host:port.
    """
    if server:
        return _checked(Address(server, "--server", service))
    settings = load_settings()
    field = f"{service}_listen"
    listen = _reachable(getattr(settings, field))
    if field in settings.model_fields_set:
        return _checked(Address(listen, f"OUTBOX_{field.upper()}", service))
    stack = read_endpoints()
    if stack is not None:
        found = stack["dispatchers"][0] if service == "dispatcher" else stack[service]
        return Address(found, str(ENDPOINTS), service)
    return Address(listen, _DEFAULT, service)


def read_endpoints() -> dict[str, Any] | None:
    """Return what `outbox up` wrote in this folder; None if it does not run here.

    Raises:
        CommandFailed: the file is not what `up` writes.
    """
    try:
        found: dict[str, Any] = json.loads(ENDPOINTS.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CommandFailed(f"{ENDPOINTS} cannot be read: {error}") from None
    return found


@contextmanager
def connection(service: str, server: str | None) -> Iterator[Client]:
    """A client of one service; a call's error inside becomes a CommandFailed.

    Raises:
        CommandFailed: a call failed; the text says all that the server said, in one line.
    """
    address = find_address(service, server)
    credentials = credentials_for(address.target, load_settings())
    addresses: dict[str, Any] = {service: address.target}
    with Client(
        **addresses, api_key=credentials.api_key or None, tls=credentials.tls, retry=_RETRY
    ) as client:
        try:
            yield client
        except CallError as error:
            raise CommandFailed(describe(error, address, credentials.tls)) from None


def pages(
    method: Callable[[_Request], _Page], request: _Request, field: str, *, everything: bool
) -> _Page:
    """Return one page of a list; with `everything` one that holds what all pages do."""
    asked: Any = request
    if everything:
        asked.page_size = asked.page_size or _LARGEST_PAGE
    page: Any = method(asked)
    while everything and page.next_page_token:
        asked.page_token = page.next_page_token
        more: Any = method(asked)
        getattr(page, field).extend(getattr(more, field))
        page.next_page_token = more.next_page_token
    answer: _Page = page
    return answer


# What changed nothing, and says so: to repeat it as it is would help nobody.
_REFUSALS: Final = (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unauthenticated,
    Unimplemented,
)


def describe(error: CallError, address: Address, tls: Tls | None = None) -> str:
    """Return one line: message, reason and field violations; or why no server answered.

    Takes some seconds where none did: it connects again to find out why.
    """
    status = _HTTP_STATUS.search(error.message)
    if isinstance(error, Unimplemented):
        line = _about_unimplemented(error, address, tls)
    elif status is not None and not error.reason:
        line = (
            f"{address} answered with HTTP status {status[1]}, as no {address.title} does: it is "
            "another server, or a proxy that cannot reach Outbox"
        )
    elif isinstance(error, Unavailable) and not error.reason:
        line = _about_no_answer(address, tls)
    elif isinstance(error, DeadlineExceeded):
        line = f"no answer in time from {address}: the {address.title} may be overloaded; try again"
    else:
        line = " ".join(str(error).split())
    if error.request_id and not isinstance(error, _REFUSALS):
        line += f"; the batch may have been accepted: try again with --request {error.request_id}"
    return printable(line)


def in_brief(error: CallError, asked: str) -> str:
    """Return one line at once, without looking for the cause; for views that are drawn again."""
    if isinstance(error, Unavailable | DeadlineExceeded) and not error.reason:
        return f"no answer from {asked}"
    return printable(" ".join(str(error).split()))


def _about_no_answer(address: Address, tls: Tls | None) -> str:
    found = _HOST_PORT.fullmatch(address.target)
    if found is None:  # a form of gRPC's own
        return f"no answer at {address}: {address.fix}"
    target = Target(
        found[1].strip("[]"), int(found[2]), address.title, tls, str(address), address.fix
    )
    return why_no_answer(target)


def _about_unimplemented(error: CallError, address: Address, tls: Tls | None) -> str:
    """Tell another server from one that is older than this command."""
    there = which_server(address.target, tls, address.service)
    reason = f" ({error.reason})" if error.reason else ""
    if there is None:
        return (
            f"{address} is a gRPC server, but no {address.title} of Outbox{reason}: {address.fix}"
        )
    if there != address.service:
        other = SERVERS[there][0]
        return (
            f"{address} is the {other}, and this command asks the {address.title}{reason}: "
            f"{address.fix}"
        )
    return (
        f"the {address.title} at {address} lacks the method of this command{reason}: "
        "it is older; upgrade it"
    )


def _checked(address: Address) -> Address:
    """Return the address.

    Raises:
        ConfigurationError: it is not host:port.
    """
    found = _HOST_PORT.fullmatch(address.target)
    if found is not None and 0 < int(found[2]) <= _LAST_PORT:
        return address
    if address.target.startswith(_GRPC_SCHEMES):
        return address
    raise ConfigurationError(
        f"{address.origin}: {address.target!r} is not HOST:PORT, such as 127.0.0.1:50051; "
        "an IPv6 address stands in brackets, and nothing like http:// goes before it"
    )


def _reachable(listen: str) -> str:
    """Return the address under which a listener on all addresses is reached from here."""
    host, _, port = listen.rpartition(":")
    loopback = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104 - not bound, but asked
    return f"{loopback.get(host, host)}:{port}" if host else listen
