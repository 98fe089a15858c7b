"""`python -m bench.sink`: an SMTP server that accepts every mail and stores none.

It stands in for Postfix's smtp-sink where that is missing, and where a row needs STARTTLS and AUTH,
which smtp-sink does not have. It prints its port.
"""

from __future__ import annotations

import argparse
import asyncio
import ssl
from typing import Final, cast

import uvloop

_LIMIT: Final = 64 * 1024


class SinkSession(asyncio.Protocol):
    """One connection. Commands may be pipelined."""

    def __init__(self, tls: ssl.SSLContext | None, *, auth: bool) -> None:
        self._tls = tls
        self._auth = auth
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._in_body = False
        self._ended = False
        self._encrypted = False
        self._authenticated = not auth
        self._upgrade: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet, except after STARTTLS."""
        self._transport = cast("asyncio.Transport", transport)
        if not self._encrypted:
            self._transport.write(b"220 sink.example ESMTP\r\n")

    def data_received(self, data: bytes) -> None:
        """Answer complete lines, and the ends of bodies."""
        self._buffer += data
        replies = []
        while self._buffer and not self._ended:
            if self._in_body:
                body, end, rest = self._buffer.partition(b"\r\n.\r\n")
                if not end:
                    # Only what may be the beginning of the end is kept.
                    self._buffer = body[-4:]
                    break
                self._in_body, self._buffer = False, rest
                replies.append(b"250 2.0.0 Ok\r\n")
                continue
            line, end, rest = self._buffer.partition(b"\r\n")
            if not end:
                if len(self._buffer) > _LIMIT:
                    self._close()
                break
            self._buffer = rest
            reply = self._reply(line)
            if reply is None:
                break
            replies.append(reply)
        if replies and self._transport is not None:
            self._transport.write(b"".join(replies))
        if self._ended:
            self._close()

    def _reply(self, line: bytes) -> bytes | None:
        """Return the reply to a command; None if the session goes on in another way."""
        verb = line[:4].upper()
        if verb == b"STAR" and self._tls is not None and not self._encrypted:
            # What came behind it in clear is not taken for a part of the session.
            self._buffer = b""
            self._upgrade = asyncio.get_running_loop().create_task(self._start_tls(self._tls))
            return None
        return self._plain_reply(verb)

    def _plain_reply(self, verb: bytes) -> bytes:
        reply = b"250 2.0.0 Ok\r\n"
        if verb == b"QUIT":
            self._ended = True
            reply = b"221 2.0.0 Bye\r\n"
        elif verb in (b"EHLO", b"HELO"):
            reply = self._features()
        elif verb == b"AUTH":
            self._authenticated = self._encrypted
            reply = b"235 2.7.0 Ok\r\n" if self._encrypted else b"538 5.7.11 Encrypt first\r\n"
        elif verb in (b"MAIL", b"DATA") and not self._authenticated:
            reply = b"530 5.7.0 Authenticate first\r\n"
        elif verb == b"DATA":
            self._in_body = True
            reply = b"354 Go on\r\n"
        return reply

    def _features(self) -> bytes:
        features = [b"sink.example", b"PIPELINING", b"8BITMIME", b"SIZE 20000000"]
        if self._tls is not None and not self._encrypted:
            features.append(b"STARTTLS")
        elif self._auth:
            features.append(b"AUTH PLAIN")
        lines = [b"250-%s\r\n" % one for one in features]
        return b"".join(lines) + b"250 ENHANCEDSTATUSCODES\r\n"

    async def _start_tls(self, context: ssl.SSLContext) -> None:
        if self._transport is None:
            return
        self._transport.write(b"220 2.0.0 Go on\r\n")
        self._encrypted = True
        try:
            upgraded = await asyncio.get_running_loop().start_tls(
                self._transport, self, context, server_side=True
            )
        except (OSError, ssl.SSLError):
            self._close()
            return
        # The event loop does not tell the protocol about its new transport.
        self._transport = upgraded

    def _close(self) -> None:
        if self._transport is not None:
            self._transport.close()


async def serve(certificate: str | None, key: str | None, *, auth: bool) -> None:
    """Serve until the process ends."""
    tls = None
    if certificate is not None:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(certificate, key)
    server = await asyncio.get_running_loop().create_server(
        lambda: SinkSession(tls, auth=auth), "127.0.0.1", 0, backlog=1024
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main() -> None:
    """Serve on a free port."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--certificate", help="PEM file of a certificate: offer STARTTLS")
    parser.add_argument("--key", help="PEM file of its key")
    parser.add_argument("--auth", action="store_true", help="require AUTH; any password is right")
    options = parser.parse_args()
    uvloop.run(serve(options.certificate, options.key, auth=options.auth))


if __name__ == "__main__":
    main()
