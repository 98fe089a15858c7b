"""Connections that a peer resets while nobody uses them, in the event loop of the services.

A program that ends with bytes unread resets its connections. uvloop then closes the socket, and
raises RuntimeError, which asyncio never does, if something is written.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop
from redis.exceptions import ConnectionError as RedisConnectionError

from outbox_server.deploy.embedded.valkey import ValkeyServer
from outbox_server.deploy.wheels import valkey_binary
from outbox_server.shared.queue.connection import connect
from outbox_server.shared.queue.pipelining import PipelinedConnection
from outbox_server.shared.settings import load_settings
from outbox_server.shared.smtp.stream import ConnectionLost, SmtpStream
from tests.conftest import Stores
from tests.eventually import eventually


def in_uvloop(test: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(test)


@asynccontextmanager
async def redis_of(stores: Stores, folder: Path) -> AsyncIterator[ValkeyServer]:
    server = ValkeyServer(folder, binary=stores.redis.binary or valkey_binary())
    await server.start()
    try:
        yield server
    finally:
        await server.kill()


async def reset(server: ValkeyServer, connection: Any) -> None:
    """End a server that has not read what the connection has sent. Return once that is known."""
    os.kill(server.child.pid, signal.SIGSTOP)
    await connection.send_command("PING")
    await server.kill()
    await eventually(connection._writer.transport.is_closing)


@asynccontextmanager
async def reset_connection(stores: Stores, folder: Path) -> AsyncIterator[tuple[Any, Any]]:
    """Yield a connection to Redis that was reset, and its pool."""
    async with (
        redis_of(stores, folder) as server,
        connect(load_settings(redis_url=server.url)) as client,
    ):
        pool: Any = client.connection_pool
        connection = pool.make_connection()
        await connection.connect()
        try:
            await reset(server, connection)
            yield connection, pool
        finally:
            await connection.disconnect(nowait=True)


def test_a_call_on_a_reset_connection_to_redis_fails_as_every_lost_call(
    stores: Stores, tmp_path: Path
) -> None:
    async def test() -> None:
        async with reset_connection(stores, tmp_path) as (connection, _):
            with pytest.raises(RedisConnectionError, match="was lost"):
                await connection.send_command("PING")

    in_uvloop(test())


def test_scripts_do_not_take_over_a_reset_connection(stores: Stores, tmp_path: Path) -> None:
    async def test() -> None:
        async with reset_connection(stores, tmp_path) as (connection, pool):
            with pytest.raises(RedisConnectionError, match="lost at once"):
                PipelinedConnection(connection, pool, lambda: None, lambda _: None)

    in_uvloop(test())


@asynccontextmanager
async def resetting() -> AsyncIterator[int]:
    """Listen on a port, and reset each connection."""

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


def test_tls_is_refused_at_once_on_a_reset_connection() -> None:
    async def test() -> None:
        async with resetting() as port:
            stream = SmtpStream()
            await asyncio.get_running_loop().create_connection(lambda: stream, "127.0.0.1", port)
            await eventually(lambda: stream.closed)
            with pytest.raises(ConnectionLost):
                await stream.encrypt(ssl.create_default_context(), "mail.test", 60)

    in_uvloop(test())
