"""The way from a command to a service: which address, one channel, and errors as one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import grpc
import typer
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from cli.channel import open_channel
from cli.lazy import CommandFailed
from cli.output import printable
from shared.settings import load_settings

ENDPOINTS: Final = Path(".outbox/endpoints.json")
# Of one call; an upload of any size and a drain take their own.
TIMEOUT_S: Final = 30.0
# Of one that changes very many rows.
LONG_TIMEOUT_S: Final = 300.0
UPLOAD_TIMEOUT_S: Final = 3600.0
_CHANNEL: Final = (
    ("grpc.max_receive_message_length", 16 * 1024 * 1024),
    # A service that is started again is found again at once, and not after the default's 20 s.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)

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
def connection(service: str, server: str | None) -> Iterator[grpc.Channel]:
    """One channel to a service; a call's error inside becomes a CommandFailed.

    Raises:
        CommandFailed: a call failed; the text says all that the server said, in one line.
    """
    address = find_address(service, server)
    with open_channel(address.target, load_settings(), _CHANNEL) as channel:
        try:
            yield channel
        except grpc.RpcError as error:
            raise CommandFailed(describe(error, address)) from None


def describe(error: grpc.RpcError, address: Address) -> str:
    """Return one line: message, reason, field violations; or which address does not answer."""
    code, details = error.code(), error.details() or ""
    status = rpc_status.from_call(error)
    if status is None and code is grpc.StatusCode.UNAVAILABLE:
        return (
            f"no answer at {address.target} ({address.origin}): start `outbox up` in this folder, "
            "or name another address with --server"
        )
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"no answer in time from {address.target} ({address.origin})"
    reason, violations = code.name, []
    for detail in status.details if status is not None else ():
        info, request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(request):
            violations = [f"{one.field}: {one.description}" for one in request.field_violations]
    said = [text for text in violations if text not in details]
    line = " ".join("; ".join([f"{details} ({reason})", *said]).split())
    return printable(line)


def _reachable(listen: str) -> str:
    """Return the address under which a listener on all addresses is reached from here."""
    host, _, port = listen.rpartition(":")
    loopback = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104 - not bound, but asked
    return f"{loopback.get(host, host)}:{port}" if host else listen
