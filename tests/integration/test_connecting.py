"""Attempts to connect to PostgreSQL."""

from __future__ import annotations

import asyncio
import socket

import pytest

from outbox_server.shared.database.connecting import connect, parse_target
from tests.eventually import PATIENCE


async def test_a_cancelled_attempt_closes_its_socket_while_its_error_is_kept() -> None:
    """PostgreSQL keeps the process of an open socket, and DROP DATABASE waits for it."""
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        port = listener.getsockname()[1]
        target = parse_target(f"postgresql://ann:secret@127.0.0.1:{port}/outbox?connect_timeout=0")
        attempt = asyncio.create_task(connect(target, {}))
        async with asyncio.timeout(PATIENCE):
            server, _ = await loop.sock_accept(listener)
            with server:
                assert await loop.sock_recv(server, 1024), "it waits for the server's first answer"
                attempt.cancel()
                with pytest.raises(asyncio.CancelledError) as error:
                    await attempt
                assert await loop.sock_recv(server, 1024) == b"", "the end of the connection"
                assert error.tb is not None
