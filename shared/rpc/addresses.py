"""The addresses that servers listen on: their form, and binding them."""

from __future__ import annotations

import grpc

from outbox_server.shared.listening import cannot_bind, check_listen_address


def check_address(variable: str, listen: str) -> None:
    """Check that an address is `host:port` or `unix:path`; `variable` is its setting.

    Raises:
        ConfigurationError: it is neither.
    """
    if not listen.startswith("unix:"):
        check_listen_address(variable, listen)


async def bind(
    server: grpc.aio.Server,
    variable: str,
    listen: str,
    credentials: grpc.ServerCredentials | None = None,
) -> int:
    """Bind a server that is not started, with TLS if there are credentials; return the port.

    Raises:
        ConfigurationError: the address cannot be bound.
    """
    try:
        if credentials is None:
            return server.add_insecure_port(listen)
        return server.add_secure_port(listen, credentials)
    except RuntimeError as error:
        await server.stop(None)
        raise cannot_bind(variable, listen) from error
