"""Peers of a server: connections from other loopback addresses, by the hundred or by relay."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from typing import Final, Self

# The beginning of a TLS handshake: the first 12 bytes of a ClientHello of 512 bytes.
HALF_A_HELLO: Final = bytes.fromhex("160301020001") + b"\x00\x01\xfc\x03\x03\x00"


class Flood:
    """Connections from one address that send `first` and then nothing."""

    def __init__(self, port: int, source: str = "127.0.0.1", first: bytes = b"") -> None:
        self._port = port
        self._source = source
        self._first = first
        self._open = ExitStack()
        self.connections: list[socket.socket] = []

    async def open(self, count: int) -> None:
        """Open `count` more connections."""
        loop = asyncio.get_running_loop()
        for _ in range(count):
            opened = self._open.enter_context(socket.socket())
            opened.setblocking(False)
            opened.bind((self._source, 0))
            await loop.sock_connect(opened, ("127.0.0.1", self._port))
            with suppress(ConnectionError):  # the server has closed it already
                await loop.sock_sendall(opened, self._first)
            self.connections.append(opened)

    def alive(self) -> int:
        """Return how many connections the server has not ended."""
        return sum(not _has_ended(each) for each in self.connections)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()


def _has_ended(connection: socket.socket) -> bool:
    try:
        while connection.recv(65_536):
            pass
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
    return True


@asynccontextmanager
async def relayed(port: int, source: str) -> AsyncIterator[str]:
    """Yield an address whose connections reach the server at `port` from the address `source`."""
    pumps: set[asyncio.Task[None]] = set()
    writers: set[asyncio.StreamWriter] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.add(writer)
        with suppress(ConnectionError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, forth = await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))
        for task in (
            asyncio.create_task(pump(reader, forth)),
            asyncio.create_task(pump(back, writer)),
        ):
            pumps.add(task)
            task.add_done_callback(pumps.discard)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        for writer in writers:
            writer.close()
        await server.wait_closed()
