"""One connection that carries many calls at once: each is written soon, replies come in order.

redis-py gives each call a connection of its own for as long as the call takes, and several tasks
and time limits. Here a call costs one write and one future. redis-py still opens the connection
(address, TLS, login, database). Then this module takes over its transport.

Redis sends the replies to all commands of one write together, after it has executed the last of
them. So an urgent call is written alone, and the others follow once its reply has come.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import hiredis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from outbox_server.shared.queue.places import Address, ConnectionSource

_INCOMPLETE: Final = object()


class NoReplyError(RedisConnectionError):
    """A command was written and no reply came: it may or may not have been executed."""


class NoReplyInTimeError(NoReplyError, RedisTimeoutError):
    """The same, because the reply took too long."""


class _Written:
    """The commands of one write, and their replies so far."""

    __slots__ = ("at", "count", "future", "given_up", "replies")

    def __init__(self, count: int, at: float, future: asyncio.Future[list[Any]]) -> None:
        self.count = count
        self.at = at
        self.future = future
        self.replies: list[Any] = []
        # The caller has its answer already. Replies that still come are only counted.
        self.given_up = False


class PipelinedConnection(asyncio.Protocol):
    """A connection that is open, until it is closed or lost."""

    def __init__(
        self,
        connection: AbstractConnection,
        pool: ConnectionSource,
        on_replies: Callable[[], None],
        on_lost: Callable[[PipelinedConnection], None],
    ) -> None:
        """Take over a connection of redis-py, which must have been opened just now.

        `on_replies` is called when all replies of one `write` have come or are given up, and
        `on_lost` when the connection has ended.

        Raises:
            redis.exceptions.ConnectionError: it was lost again.
        """
        private: Any = connection
        if private._writer.transport.is_closing():  # noqa: SLF001 - it has no public name
            # The end of the connection can no longer be reported to anybody.
            raise RedisConnectionError("the connection to Redis was lost at once")
        # Neither a later redis-py nor the garbage collector may close them.
        self._streams = private._reader, private._writer  # noqa: SLF001 - it has no public name
        private._reader = private._writer = None  # noqa: SLF001
        self._transport: asyncio.Transport = self._streams[1].transport
        encoder = connection.encoder
        self._parser = hiredis.Reader(
            protocolError=InvalidResponse,
            replyError=private._parser.parse_error,  # noqa: SLF001
            notEnoughData=_INCOMPLETE,
            encoding=encoder.encoding,
            errors=encoder.encoding_errors,
        )
        self._loop = asyncio.get_running_loop()
        self._limit_s: float | None = connection.socket_timeout
        self._pool = pool
        self._departures = pool.departures
        # None for a Unix socket.
        self._address: Address | None = None
        if pool.place is not None:
            self._address = private.host, private.port
        self._on_replies = on_replies
        self._on_lost = on_lost
        self._waiting: deque[_Written] = deque()
        # When the first of them became the first, or was given up.
        self._first_since = 0.0
        # Commands that are sent once all tasks that run now have added their own. The calls of
        # `_unsent` are the last ones of `_waiting`.
        self._urgent: list[bytes] = []
        self._unsent: list[bytes] = []
        self._flushing = False
        # The urgent call after whose reply `_unsent` is sent.
        self._before: _Written | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._retired = False
        self._ended = False
        self._lost = asyncio.Event()
        # It is not set while too much is waiting to be sent.
        self._writable = asyncio.Event()
        self._writable.set()
        self._transport.set_protocol(self)

    @property
    def is_usable(self) -> bool:
        """Whether further calls may use it. They may not after its server was left."""
        return not (
            self._ended
            or self._retired
            or self._departures != self._pool.departures
            or self._transport.is_closing()
        )

    @property
    def is_writable(self) -> bool:
        """Whether the server takes what is sent."""
        return self._writable.is_set()

    async def until_writable(self) -> None:
        """Wait until the server takes what is sent, or the connection has ended."""
        await self._writable.wait()

    def write(
        self, commands: bytes, count: int, *, urgent: bool = False
    ) -> asyncio.Future[list[Any]]:
        """Send `count` commands in one piece. Returns their replies.

        The replies include errors: those of the server, and `NoReplyError`. The future may be
        ignored: the replies of others stay in order.

        An `urgent` call goes before the calls of the same moment that are not. They wait for its
        reply, and for no other urgent call.
        """
        future: asyncio.Future[list[Any]] = self._loop.create_future()
        now = self._loop.time()
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)
        written = _Written(count, now, future)
        if urgent:
            self._urgent.append(commands)
            self._waiting.insert(len(self._waiting) - len(self._unsent), written)
        else:
            self._unsent.append(commands)
            self._waiting.append(written)
        if self._limit_s is not None and self._timer is None:
            self._timer = self._loop.call_at(now + self._limit_s, self._check_limit)
        return future

    def _flush(self) -> None:
        """Send what has been written. What several tasks write at the same time is sent at once."""
        self._flushing = False
        if not self._urgent:
            if self._before is None:
                self._send_all()
            return
        if self._unsent and self._before is None:
            self._before = self._waiting[-len(self._unsent) - 1]
        urgent, self._urgent = self._urgent, []
        self._send(urgent)

    def _send_all(self) -> None:
        """Send the other calls too, in the order of `_waiting`."""
        self._before = None
        commands, self._urgent, self._unsent = self._urgent + self._unsent, [], []
        self._send(commands)

    def _send(self, commands: list[bytes]) -> None:
        if commands and not (self._ended or self._transport.is_closing()):
            self._transport.write(b"".join(commands))

    def retire(self) -> None:
        """Close it after the calls that are under way."""
        self._retired = True
        if not self._waiting:
            self._transport.close()

    async def aclose(self) -> None:
        """Close it now. The calls under way fail."""
        self._end(NoReplyError, "the client was closed")
        await self._lost.wait()

    def data_received(self, data: bytes) -> None:
        """Give the replies to their calls."""
        try:
            self._parser.feed(data)
            while (reply := self._parser.gets()) is not _INCOMPLETE:
                # Nothing asks for such messages here, but a server may send them.
                if not isinstance(reply, hiredis.PushNotification):
                    self._received(reply)
        except (InvalidResponse, ValueError) as error:
            self._end(NoReplyError, f"the server sent something that is not a reply: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        """Give up the calls that are under way."""
        cause = "" if exc is None else f" ({exc})"
        self._end(NoReplyError, f"the connection to Redis was lost before its reply{cause}")
        self._lost.set()
        self._on_lost(self)

    def pause_writing(self) -> None:
        """Note that the server takes less than is sent."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """Note that the server takes what is sent."""
        self._writable.set()

    def _received(self, reply: Any) -> None:
        if not self._waiting:
            raise InvalidResponse("a reply without a call")
        first = self._waiting[0]
        first.replies.append(reply)
        if isinstance(reply, RedisError) and self._pool.judge(reply, self._address):
            self._retired = True
        if len(first.replies) == first.count:
            self._waiting.popleft()
            self._first_since = self._loop.time()
            if first is self._before:
                self._send_all()
            self._finish(first, first.replies)
        if self._retired and not self._waiting:
            self._transport.close()

    def _finish(self, written: _Written, replies: list[Any]) -> None:
        if written.given_up:
            return
        if not written.future.done():
            written.future.set_result(replies)
        self._on_replies()

    def _give_up(self, written: _Written, kind: type[NoReplyError], text: str) -> None:
        # Each gets an error of its own, because raising one adds to its traceback.
        missing = written.count - len(written.replies)
        self._finish(written, written.replies + [kind(text) for _ in range(missing)])
        written.given_up = True

    def _due(self, limit_s: float) -> float:
        """Return until when the first call may wait for its reply.

        Replies come in order, so a call waits for those before it. Its time begins when it is the
        first, but ends at twice the limit after it was sent. A call that was given up gets the same
        time once more, because its late reply would free the calls behind it.
        """
        first = self._waiting[0]
        # The time of a call that was given up has passed.
        waits = self._waiting[1] if first.given_up else first
        return min(max(first.at, self._first_since) + limit_s, waits.at + 2 * limit_s)

    def _check_limit(self) -> None:
        """Give up the first call if it is overdue. If it was given up before, give up all calls."""
        self._timer = None
        if not self._waiting or self._limit_s is None:
            return
        now = self._loop.time()
        if self._due(self._limit_s) <= now:
            first = self._waiting[0]
            text = f"no reply from Redis within {self._limit_s:g} s"
            if first.given_up or len(self._waiting) == 1:
                self._end(NoReplyInTimeError, text)
                return
            # Further calls use another connection.
            self._retired = True
            self._first_since = now
            self._pool.judge(NoReplyInTimeError(text), self._address)
            self._give_up(first, NoReplyInTimeError, text)
        self._timer = self._loop.call_at(self._due(self._limit_s), self._check_limit)

    def _end(self, kind: type[NoReplyError], text: str) -> None:
        if self._ended:
            return
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()
        self._transport.abort()
        if self._waiting:
            self._pool.judge(kind(text), self._address)
        while self._waiting:
            self._give_up(self._waiting.popleft(), kind, text)
        self._writable.set()
