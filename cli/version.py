"""`outbox version`: the versions of this command and of the servers that it reaches."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from typing import Any, Final

import typer
from outbox.v1 import server_service_pb2 as pb
from outbox_client import NO_RETRIES, CallError, Client

from outbox_server.cli.addresses import (
    ENDPOINTS,
    Address,
    find_address,
    key_file_of,
    read_endpoints,
)
from outbox_server.cli.call_errors import failure_of, in_brief
from outbox_server.cli.client import Server
from outbox_server.cli.connection_check import SERVERS, channel_options
from outbox_server.cli.credentials import credentials_for
from outbox_server.cli.output import Output, OutputFormat, print_json, print_rows, to_document
from outbox_server.shared.settings import load_settings

_LIMIT_S: Final = 3.0
_COLUMNS: Final = ("address", "service", "version", "schema_revision", "code_schema_revision")

app = typer.Typer(add_completion=False)


@app.command()
def version(server: Server = None, output: Output = OutputFormat.TABLE) -> None:
    """Show the version of this command, and of each server that answers.

    For each server, it also shows the revision of the database's schema and
    the one that the server needs. With --server, it asks only that server,
    and fails if there is no answer.
    """
    ours = importlib.metadata.version("outbox")
    found = [_ask(address, required=server is not None) for address in _addresses(server)]
    if output is OutputFormat.JSON:
        print_json({"version": ours, "servers": found})
        return
    rows = [["", "this command", ours, "", ""]]
    for one in found:
        if "error" in one:
            rows.append([str(one["address"]), str(one["error"]), "", "", ""])
        else:
            rows.append([str(one.get(name, "")) for name in _COLUMNS])
    print_rows([name.removesuffix("_revision") for name in _COLUMNS], rows)


def _addresses(server: str | None) -> Iterator[Address]:
    if server is not None:
        yield find_address("scheduler", server)
        return
    for service in SERVERS:
        yield find_address(service, None)
    # `outbox up` may run several dispatchers.
    stack = read_endpoints() or {}
    for target in stack.get("dispatchers", [])[1:]:
        yield Address(target, str(ENDPOINTS), "dispatcher", key_file_of(stack))


def _ask(asked: Address, *, required: bool) -> dict[str, Any]:
    address = asked.target
    credentials = credentials_for(address, load_settings(), asked.key_file)
    with Client(
        address,
        api_key=credentials.api_key or None,
        tls=credentials.tls,
        retry=NO_RETRIES,
        options=channel_options(),
    ) as client:
        try:
            info = client.server.GetServerInfo(pb.GetServerInfoRequest(), timeout=_LIMIT_S)
        except CallError as error:
            if required:
                raise failure_of(error, asked, credentials.tls) from None
            return {"address": address, "error": in_brief(error, address)}
    return {"address": address, **to_document(info)}
