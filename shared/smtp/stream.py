"""The connection of an SMTP session: reads replies, and writes bytes with flow control."""

from __future__ import annotations

import asyncio
import math
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final, cast

from outbox_server.shared.smtp.limits import Deadline
from outbox_server.shared.smtp.reply_parser import MalformedReply, ReplyParser, WireReply

# Replies that may wait unread. A group of commands has at most five, so a server that sends more
# than this replies to commands that nobody sent.
MAX_UNREAD_REPLIES: Final = 16


class ConnectionLost(OSError):
    """The connection ended, by the server or by the network."""


class SmtpStream(asyncio.Protocol):
    """One connection with one listener at a time: a callback, or a task that waits.

    A listener has a limit in seconds, which it sets again for each reply, and a deadline that may
    move. All limits of a connection share one timer, which is set again only when it fires early.
    A timer per wait would cost more than all other work for a reply.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser = ReplyParser()
        self._replies = self._parser.replies
        self._failure: Exception | None = None
        self._hear: Callable[[], None] | None = None
        self._paused = False
        self._closed = False
        self._latest = math.inf
        self._deadline: Deadline | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0

    # Called by the transport -----------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        # isinstance cannot be used, because uvloop's transports have no common base class with
        # asyncio's.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Parse replies, and call the listener."""
        if self._failure is None:
            try:
                self._parser.feed(data)
                if len(self._replies) > MAX_UNREAD_REPLIES:
                    self._failure = MalformedReply("more replies than commands")
            except MalformedReply as error:
                self._failure = error
        self._wake()

    def eof_received(self) -> bool:
        """Note that the server will send nothing more. The transport then closes itself."""
        self._fail(ConnectionLost("the server closed the connection"))
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Note that the connection is closed."""
        self._closed = True
        self._stop_timer()
        reason = "the connection was closed" if exc is None else str(exc)
        self._fail(ConnectionLost(reason or type(exc).__name__))

    def pause_writing(self) -> None:
        """Note that the server accepts no more bytes for now."""
        self._paused = True

    def resume_writing(self) -> None:
        """Note that the server accepts bytes again."""
        self._paused = False
        self._wake()

    def _fail(self, failure: Exception) -> None:
        if self._failure is None:
            self._failure = failure
        self._wake()

    def _wake(self) -> None:
        if self._hear is not None:
            self._hear()

    # Called by a listener --------------------------------------------------------------------

    def listen(self, hear: Callable[[], None], deadline: Deadline) -> None:
        """Call `hear` after each event, until `stop_listening`.

        Events are: bytes have arrived, the connection has ended, the server accepts bytes again,
        the time is over. `hear` must not raise an error.
        """
        self._hear, self._deadline = hear, deadline
        self._latest = math.inf
        deadline.watch(self._look_at_time)

    def stop_listening(self) -> None:
        """Call the listener no more."""
        if self._deadline is not None:
            self._deadline.unwatch(self._look_at_time)
        self._hear = self._deadline = None

    def limit(self, seconds: float) -> None:
        """Let the listener's time be over in `seconds` from now, or at its deadline if earlier."""
        now = time.monotonic()
        self._latest = now + seconds
        self._set_timer(now)

    def raise_if_over(self) -> None:
        """Raise the error that ends the wait for the next event, if there is one.

        Raises:
            TimeoutError: the time is over.
            ConnectionLost: the connection ended.
            MalformedReply: the server does not speak SMTP.
        """
        if self._failure is not None:
            raise self._failure
        if time.monotonic() >= self._end:
            raise TimeoutError

    # Called by sessions ----------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """Whether commands can be sent and replies can arrive."""
        return self._failure is None and not self.transport.is_closing()

    @property
    def closed(self) -> bool:
        """Whether the socket is closed."""
        return self._closed

    @property
    def unread(self) -> bool:
        """Whether a reply has arrived that was not taken yet."""
        return bool(self._replies)

    @property
    def writable(self) -> bool:
        """Whether a write need not wait: bytes flow, or the connection failed."""
        return not self._paused or self._failure is not None

    @property
    def transport(self) -> asyncio.Transport:
        """The transport. TLS replaces it.

        Raises:
            ConnectionLost: there is no connection yet.
        """
        if self._transport is None:
            raise ConnectionLost("not connected")
        return self._transport

    def write(self, data: bytes | memoryview) -> None:
        """Send bytes, or buffer them until the server accepts them.

        Nothing is sent on an ended connection with an unread reply: that reply decides.

        Raises:
            ConnectionLost: the connection has ended.
            MalformedReply: the server has sent something that is not SMTP.
        """
        if self._replies and not self.connected:
            return
        self.raise_if_ended()
        self.transport.write(data)

    def raise_if_ended(self) -> None:
        """Raise the error of a connection on which nothing can be sent.

        Raises:
            ConnectionLost: the connection has ended.
            MalformedReply: the server has sent something that is not SMTP.
        """
        if self._failure is not None:
            raise self._failure
        if self.transport.is_closing():
            raise ConnectionLost("the connection was closed")

    async def reply(self, seconds: float, deadline: Deadline) -> WireReply:
        """Return the next reply.

        Raises:
            TimeoutError: it did not arrive within `seconds`, or the deadline has passed.
            ConnectionLost: the connection ended first.
            MalformedReply: the server does not speak SMTP.
        """
        if not self._replies:
            await self._wait(lambda: bool(self._replies), seconds, deadline)
        return self._replies.popleft()

    def take(self) -> WireReply:
        """Return the next reply without waiting. `unread` must be true."""
        return self._replies.popleft()

    async def until_closed(self, seconds: float, deadline: Deadline) -> None:
        """Return when the socket is closed.

        Raises:
            TimeoutError: it was not closed within `seconds`, or the deadline has passed.
        """
        with suppress(ConnectionLost, MalformedReply):
            await self._wait(lambda: self._closed, seconds, deadline)

    async def encrypt(
        self, context: ssl.SSLContext, server_hostname: str, handshake_limit: float
    ) -> None:
        """Do the TLS handshake, within `handshake_limit` seconds.

        Raises:
            ConnectionLost: the connection ended before it.
            MalformedReply: the server has sent something that is not SMTP.
            OSError: the handshake failed; ssl.SSLCertVerificationError if the certificate is not
                trusted.
        """
        # asyncio and uvloop would wait until the limit ends.
        self.raise_if_ended()
        # RFC 3207, section 6: bytes received before TLS are discarded; anyone may have sent them.
        self._parser.clear()
        self._transport = cast(
            asyncio.Transport,
            await self._loop.start_tls(
                self.transport,
                self,
                context,
                server_hostname=server_hostname,
                ssl_handshake_timeout=handshake_limit,
            ),
        )

    def abort(self) -> None:
        """Close at once, and discard what was not sent yet."""
        if self._transport is not None:
            self._transport.abort()
        self._fail(ConnectionLost("the connection was aborted"))

    async def _wait(self, arrived: Callable[[], bool], seconds: float, deadline: Deadline) -> None:
        """Wait until `arrived` returns True; it is called after each event."""
        event: asyncio.Future[None] | None = None

        def hear() -> None:
            if event is not None and not event.done():
                event.set_result(None)

        self.listen(hear, deadline)
        self.limit(seconds)
        try:
            while not arrived():
                self.raise_if_over()
                event = self._loop.create_future()
                await event
        finally:
            self.stop_listening()

    @property
    def _end(self) -> float:
        return self._latest if self._deadline is None else min(self._latest, self._deadline.until)

    def _set_timer(self, now: float) -> None:
        """Make sure that a timer fires at the end of the listener's time, or before it."""
        end = self._end
        if self._timer is None or self._timer_at > end:
            self._stop_timer()
            self._timer_at = end
            self._timer = self._loop.call_later(max(0.0, end - now), self._timer_fired)

    def _timer_fired(self) -> None:
        self._timer = None
        self._look_at_time()

    def _look_at_time(self) -> None:
        """Call the listener if its time is over; otherwise make sure that a timer is set."""
        if self._hear is None:
            return
        now = time.monotonic()
        if now >= self._end:
            self._hear()
        else:
            self._set_timer(now)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
