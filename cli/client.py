"""Connects a command to a service."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Annotated, Any, Final, TypeVar

import typer
from google.protobuf.message import Message
from outbox_client import (
    CallError,
    Client,
    RetryPolicy,
)

from outbox_server.cli.addresses import Address, find_address
from outbox_server.cli.call_errors import failure_of
from outbox_server.cli.client_options import CONNECTION_PANEL, connection_options
from outbox_server.cli.connection_check import channel_options
from outbox_server.cli.credentials import credentials_for
from outbox_server.cli.options import Paging
from outbox_server.shared.settings import load_settings

# The limit of an upload without --timeout, as the client has it.
_UPLOAD_TIMEOUT_S: Final = 3600.0
_LARGEST_PAGE: Final = 1000
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
