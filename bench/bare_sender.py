"""`python -m bench.bare_sender PORT`: sends mails by the barest SMTP client that asyncio allows.

It is the probe of `make bench-guard`: the cost of a mail without a queue, a store or a template. It
prints its processor time per mail in us.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import Final, cast

import uvloop

_BODY: Final = (
    b"From: s@example.com\r\nTo: r@example.net\r\nSubject: Your order 00000001\r\n\r\n"
    + b"Dear Ann Example, your order 00000001 leaves Springfield today.\r\n" * 12
    + b".\r\n"
)
_LINES: Final = (
    b"MAIL FROM:<s@example.com>\r\n",
    b"RCPT TO:<r@example.net>\r\n",
    b"DATA\r\n",
    _BODY,
)


class BareSender(asyncio.Protocol):
    """One connection. It sends a line at each reply, until no mail is left."""

    def __init__(self, left: list[int], done: asyncio.Future[None]) -> None:
        self._left = left
        self._done = done
        self._step = -2
        self._transport: asyncio.Transport | None = None
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for the greeting."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Send the next line after the last line of a reply."""
        self._buffer += data
        while b"\r\n" in self._buffer:
            line, _, self._buffer = self._buffer.partition(b"\r\n")
            if line[3:4] == b"-":
                continue
            if line[:1] not in (b"2", b"3"):
                raise SystemExit(f"the server said {line!r}")
            self._next()

    def _next(self) -> None:
        if self._transport is None:
            return
        self._step += 1
        if self._step == -1:
            self._transport.write(b"EHLO probe.example\r\n")
            return
        if self._step % len(_LINES) == 0:
            if not self._left[0]:
                self._transport.close()
                if not self._done.done():
                    self._done.set_result(None)
                return
            self._left[0] -= 1
        self._transport.write(_LINES[self._step % len(_LINES)])


async def send(port: int, mails: int, connections: int) -> None:
    """Send mails over some connections, one command at a time on each."""
    loop = asyncio.get_running_loop()
    left = [mails]
    ends = [loop.create_future() for _ in range(connections)]
    for end in ends:
        await loop.create_connection(lambda end=end: BareSender(left, end), "127.0.0.1", port)  # type: ignore[misc]
    await asyncio.gather(*ends)


def main() -> None:
    """Send, and print the processor time per mail."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("--mails", type=int, default=10_000)
    parser.add_argument("--connections", type=int, default=50)
    options = parser.parse_args()
    began = time.process_time()
    uvloop.run(send(options.port, options.mails, options.connections))
    print((time.process_time() - began) / options.mails * 1e6)


if __name__ == "__main__":
    main()
