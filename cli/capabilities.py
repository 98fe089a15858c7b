"""Checks that a server knows a field that an older one would ignore."""

from __future__ import annotations

from outbox.v1.server_service_pb2 import GetServerInfoRequest
from outbox_client import Client, Unimplemented

from outbox_server.cli.lazy import CommandFailed


def check_dry_run(client: Client) -> None:
    """Check that the scheduler knows `validate_only`: an older one makes the change.

    Raises:
        CommandFailed: it does not.
    """
    try:
        known = list(client.server.GetServerInfo(GetServerInfoRequest()).capabilities)
    except Unimplemented:
        known = []
    if "change.validate_only" not in known:
        raise CommandFailed("the scheduler is too old for --dry-run; upgrade it")
