"""The way from a command to a service: which address, one client, and errors as one line."""

from __future__ import annotations

import json
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
    Unauthenticated,
    Unavailable,
)

from cli.credentials import credentials_for
from cli.lazy import CommandFailed
from cli.output import printable
from shared.settings import load_settings

ENDPOINTS: Final = Path(".outbox/endpoints.json")
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


@dataclass(frozen=True, slots=True)
class Address:
    """Where a service is asked, and who says that it is there."""

    target: str
    origin: str


def find_address(service: str, server: str | None) -> Address:
    """Return where to ask `service`: `scheduler`, `dispatcher` or `stats`.

    In this order: `server`; OUTBOX_..._LISTEN, where it is set; the stack of `outbox up` in this
    folder; the default.

    Raises:
        CommandFailed: the stack's file cannot be read.
        ConfigurationError: a variable is wrong.
    """
    if server:
        return Address(server, "--server")
    settings = load_settings()
    field = f"{service}_listen"
    listen = _reachable(getattr(settings, field))
    if field in settings.model_fields_set:
        return Address(listen, f"OUTBOX_{field.upper()}")
    stack = read_endpoints()
    if stack is not None:
        found = stack["dispatchers"][0] if service == "dispatcher" else stack[service]
        return Address(found, str(ENDPOINTS))
    return Address(listen, "the default")


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
            raise CommandFailed(describe(error, address)) from None


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
)


def describe(error: CallError, address: Address) -> str:
    """Return one line: message, reason, field violations; or which address does not answer."""
    if isinstance(error, Unavailable) and not error.reason:
        line = (
            f"no answer at {address.target} ({address.origin}): start `outbox up` in this folder, "
            "or name another address with --server (and --tls-ca, if it uses TLS)"
        )
    elif isinstance(error, DeadlineExceeded):
        line = f"no answer in time from {address.target} ({address.origin})"
    else:
        line = " ".join(str(error).split())
    if error.request_id and not isinstance(error, _REFUSALS):
        line += f"; the batch may have been accepted: try again with --request {error.request_id}"
    return printable(line)


def _reachable(listen: str) -> str:
    """Return the address under which a listener on all addresses is reached from here."""
    host, _, port = listen.rpartition(":")
    loopback = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104 - not bound, but asked
    return f"{loopback.get(host, host)}:{port}" if host else listen
