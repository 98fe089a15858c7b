"""Reads commands and bodies of bounded size from one SMTP connection, and writes replies."""

from __future__ import annotations

import asyncio
import ssl
from typing import Final

# RFC 5321, 4.5.3.1.4 asks for 512 bytes, RFC 4954 for 12,288 where AUTH carries a token.
LONGEST_COMMAND: Final = 12_288
# RFC 5321, 4.5.3.1.6, without the line end.
LONGEST_TEXT_LINE: Final = 998
_CHUNK: Final = 64 * 1024
_END_OF_BODY: Final = b"\r\n.\r\n"
_WRITE_LIMIT_S: Final = 60.0
_HANDSHAKE_LIMIT_S: Final = 30.0


class ConnectionEndedError(Exception):
    """The client has closed the connection."""


class LineTooLongError(Exception):
    """A command was longer than LONGEST_COMMAND; it has been skipped."""


class BodyTooLargeError(Exception):
    """A body was larger than the limit; it has been read to its end and dropped."""


class Wire:
    """Reads commands and bodies, and collects replies until the next wait.

    Only CRLF ends a line. A server that accepts a bare LF can be made to see two mails where
    another server sees one.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, idle_s: float
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._idle_s = idle_s
        self._received = bytearray()
        self._unsent = bytearray()

    @property
    def secure(self) -> bool:
        """Whether TLS is on."""
        return self._writer.get_extra_info("ssl_object") is not None

    @property
    def has_input(self) -> bool:
        """Whether the client has sent bytes that were not read yet."""
        return bool(self._received)

    def say(self, reply: str) -> None:
        """Add a reply. It is sent before the next wait, in the order of the commands."""
        self._unsent += reply.encode("utf-8", "replace") + b"\r\n"

    async def flush(self) -> None:
        """Send all replies.

        Raises:
            ConnectionEndedError: the client is gone, or reads nothing.
        """
        if not self._unsent:
            return
        data = bytes(self._unsent)
        self._unsent.clear()
        try:
            self._writer.write(data)
            async with asyncio.timeout(_WRITE_LIMIT_S):
                await self._writer.drain()
        except (OSError, TimeoutError):
            raise ConnectionEndedError from None

    async def read_line(self) -> bytes:
        """Return the next line without its end.

        Raises:
            ConnectionEndedError: the client has closed the connection.
            LineTooLongError: the line is too long.
            TimeoutError: the client was idle for too long.
        """
        too_long = False
        while (end := self._received.find(b"\r\n")) < 0:
            if len(self._received) > LONGEST_COMMAND:
                too_long = True
                # The last byte may be the CR of the end.
                del self._received[:-1]
            await self._fill()
        line = bytes(self._received[:end])
        del self._received[: end + 2]
        if too_long or len(line) > LONGEST_COMMAND:
            raise LineTooLongError
        return line

    async def read_body(self, limit: int) -> bytes:
        """Return a body up to its final dot, with single dots, and CRLF at the end of each line.

        Raises:
            BodyTooLargeError: it has more than `limit` bytes.
            ConnectionEndedError: the client has closed the connection.
            TimeoutError: the client was idle for too long.
        """
        # Then the end of a body is also found if the body is only the final dot.
        self._received[:0] = b"\r\n"
        body, size = bytearray(), 0
        while (end := self._received.find(_END_OF_BODY)) < 0:
            # The last bytes may be the start of the end of the body.
            cut = max(0, len(self._received) - len(_END_OF_BODY) + 1)
            size += cut
            if size <= limit + 2:
                body += self._received[:cut]
            else:
                body.clear()
            del self._received[:cut]
            await self._fill()
        size += end
        body += self._received[:end]
        del self._received[: end + len(_END_OF_BODY)]
        if size > limit:
            raise BodyTooLargeError
        if not body:
            return b""
        # RFC 5321, 4.5.2: a dot at the start of a line was added by the client.
        return bytes(body + b"\r\n").replace(b"\r\n.", b"\r\n")[2:]

    async def start_tls(self, context: ssl.SSLContext) -> None:
        """Do the TLS handshake, after the reply to STARTTLS.

        Raises:
            ConnectionEndedError: the handshake failed.
        """
        await self.flush()
        try:
            async with asyncio.timeout(_HANDSHAKE_LIMIT_S):
                await self._writer.start_tls(context)
        except (OSError, TimeoutError):  # an SSLError is an OSError
            raise ConnectionEndedError from None

    async def close(self) -> None:
        """Send the rest of the buffer, and close."""
        try:
            await self.flush()
            self._writer.close()
            async with asyncio.timeout(_WRITE_LIMIT_S):
                await self._writer.wait_closed()
        except (ConnectionEndedError, OSError, TimeoutError):
            self._writer.transport.abort()

    def abort(self) -> None:
        """Close at once, without sending the rest of the buffer."""
        self._writer.transport.abort()

    async def _fill(self) -> None:
        await self.flush()
        try:
            async with asyncio.timeout(self._idle_s):
                data = await self._reader.read(_CHUNK)
        except TimeoutError:
            raise
        except OSError:
            raise ConnectionEndedError from None
        if not data:
            raise ConnectionEndedError
        self._received += data
