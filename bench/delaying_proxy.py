"""`python -m bench.delaying_proxy PORT MS`: a TCP proxy that makes a server MS away, both ways.

Each byte arrives half of the round trip later than it was sent, in order, without a limit of
bandwidth. It needs no rights of root, unlike netem. It prints its port.
"""

from __future__ import annotations

import argparse
import asyncio
from collections import deque
from typing import cast

import uvloop


class DelayedSide(asyncio.Protocol):
    """One end of a connection. It writes the bytes that it receives to the other end, later."""

    def __init__(self, delay_s: float) -> None:
        self._delay_s = delay_s
        self._loop = asyncio.get_running_loop()
        self._pending: deque[tuple[float, bytes]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self.transport: asyncio.Transport | None = None
        self.other: DelayedSide | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember the transport."""
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Pass on the bytes after the delay."""
        self._later(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Pass on the end after the delay."""
        del exc
        self._later(b"")

    def _later(self, data: bytes) -> None:
        self._pending.append((self._loop.time() + self._delay_s, data))
        if self._timer is None:
            self._timer = self._loop.call_at(self._pending[0][0], self._pass_on)

    def _pass_on(self) -> None:
        self._timer = None
        target = None if self.other is None else self.other.transport
        # The timers of uvloop have whole milliseconds, so one may be early by a part of one.
        while self._pending and self._pending[0][0] <= self._loop.time() + 0.0005:
            data = self._pending.popleft()[1]
            if target is None or target.is_closing():
                continue
            if data:
                target.write(data)
            else:
                target.close()
        if self._pending:
            self._timer = self._loop.call_at(self._pending[0][0], self._pass_on)


class DelayedClient(DelayedSide):
    """The end of the client. It connects to the server and keeps what comes before that."""

    def __init__(self, port: int, delay_s: float) -> None:
        super().__init__(delay_s)
        self._port = port
        self._connecting: asyncio.Task[None] | None = None
        self._early: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connect to the server."""
        super().connection_made(transport)
        self._connecting = self._loop.create_task(self._connect())

    def data_received(self, data: bytes) -> None:
        """Pass on the bytes, or keep them until the server is connected."""
        if self.other is None:
            self._early.append(data)
        else:
            super().data_received(data)

    async def _connect(self) -> None:
        # A round trip passes before a client knows that it is connected.
        await asyncio.sleep(2 * self._delay_s)
        try:
            _, server = await self._loop.create_connection(
                lambda: DelayedSide(self._delay_s), "127.0.0.1", self._port
            )
        except OSError:
            if self.transport is not None:
                self.transport.close()
            return
        self.other, server.other = server, self
        early, self._early = self._early, []
        for data in early:
            super().data_received(data)
        gone = self.transport is None or self.transport.is_closing()
        if gone and server.transport is not None:
            server.transport.close()


async def serve(port: int, round_trip_ms: float) -> None:
    """Serve until the process ends."""
    delay_s = round_trip_ms / 2000
    server = await asyncio.get_running_loop().create_server(
        lambda: DelayedClient(port, delay_s), "127.0.0.1", 0, backlog=2048
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main() -> None:
    """Forward connections to a port of this machine, with a delay."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("port", type=int, help="the port of the server")
    parser.add_argument("ms", type=float, help="the round trip, in milliseconds")
    options = parser.parse_args()
    uvloop.run(serve(options.port, options.ms))


if __name__ == "__main__":
    main()
