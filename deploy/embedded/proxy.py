"""A TCP proxy on loopback that simulates network faults: refuse, hang, lag and cut."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from typing import Final, Self

from outbox_server.deploy.ports import LOOPBACK, free_port

_CHUNK: Final = 64 * 1024
_BACKLOG: Final = 512


class TcpProxy:
    """Forwards all bytes to a port on loopback, until a fault is set."""

    def __init__(self, target: Callable[[], int], tls: ssl.SSLContext | None = None) -> None:
        """`target` returns the port to connect to, and is called for every connection.

        With `tls` the proxy accepts TLS, and forwards the decrypted bytes.
        """
        self._tls = tls
        # The delay of all bytes, in seconds.
        self._lag_s = 0.0
        self._target = target
        self._socket = socket.socket()
        self._accepting: asyncio.Task[None] | None = None
        self._open = asyncio.Event()
        self._open.set()
        self._pairs: dict[asyncio.Task[None], list[asyncio.StreamWriter]] = {}

    @property
    def port(self) -> int:
        """The TCP port; known after the start."""
        return int(self._socket.getsockname()[1])

    async def __aenter__(self) -> Self:
        """Listen on a free port."""
        self._socket.setblocking(False)
        # Otherwise its own old connections would keep it from listening again.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Bind a number: Linux releases a port that it picked itself whenever nobody listens.
        self._socket.bind((LOOPBACK, free_port()))
        self.heal()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Cut all connections and free the port."""
        accepting = [] if self._accepting is None else [self._accepting]
        self.refuse()
        # The loop must have forgotten the socket before its number is used for another one.
        await asyncio.gather(*accepting, *self._pairs, return_exceptions=True)
        self._socket.close()

    def refuse(self) -> None:
        """Cut every connection, and refuse every new one."""
        if self._accepting is not None:
            self._accepting.cancel()
            self._accepting = None
            # Stop listening, but keep the port, so that no other process can take it.
            self._socket.shutdown(socket.SHUT_RDWR)
        self.cut()

    def hang(self) -> None:
        """Forward no more bytes, but close no connection. New connections hang too."""
        self._open.clear()

    def lag(self, seconds: float) -> None:
        """Forward all bytes with this delay."""
        self._lag_s = seconds

    def cut(self) -> None:
        """Cut every open connection. Bytes in transit are lost."""
        for task, writers in self._pairs.items():
            for writer in writers:
                writer.transport.abort()
            task.cancel()

    def heal(self) -> None:
        """Forward all bytes at once again, including those that `hang` held back."""
        self._lag_s = 0.0
        self._open.set()
        if self._accepting is None:
            self._socket.listen(_BACKLOG)
            self._accepting = asyncio.get_running_loop().create_task(self._accept())

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            accepted, _ = await loop.sock_accept(self._socket)
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            task = loop.create_task(self._serve(accepted))
            self._pairs[task] = []
            task.add_done_callback(self._pairs.pop)

    async def _serve(self, accepted: socket.socket) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("_serve must run as a task")
        writers = self._pairs[task]
        try:
            # The transport owns the socket from here on.
            near_reader, near = await self._near(accepted)
            writers.append(near)
            await self._open.wait()
            far_reader, far = await asyncio.open_connection(LOOPBACK, self._target())
            writers.append(far)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pump(near_reader, far))
                both.create_task(self._pump(far_reader, near))
        except* OSError:
            pass  # one side closed the connection, so the other is closed as well
        finally:
            for writer in writers:
                writer.close()

    async def _near(
        self, accepted: socket.socket
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._tls is None:
            return await asyncio.open_connection(sock=accepted)
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await loop.connect_accepted_socket(lambda: protocol, accepted, ssl=self._tls)
        return reader, asyncio.StreamWriter(transport, protocol, reader, loop)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(_CHUNK):
            if self._lag_s:
                await asyncio.sleep(self._lag_s)
            await self._open.wait()
            writer.write(data)
            await writer.drain()
        # Forward the end of the stream after the bytes.
        if writer.is_closing():
            return  # `cut` was faster
        if writer.can_write_eof():
            writer.write_eof()
        else:
            writer.close()
