"""Runs scripts over one connection at a time, however many tasks call them at once.

The scripts of a claim, a confirmation and a settlement take Redis well under a millisecond each, so
a connection of its own for each call in progress gains nothing. Scripts that take long, such as
loads, use the pool instead, because all later calls on this connection would wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import hiredis
from redis.commands.core import AsyncScript
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from outbox_server.shared.queue.pipelining import PipelinedConnection
from outbox_server.shared.queue.places import ConnectionSource

# Further calls wait until some of these have their replies.
_MOST_UNDER_WAY: Final = 256


@dataclass(frozen=True, slots=True)
class ScriptCall:
    """One run of a script. Arguments are str, int, float or bytes."""

    script: AsyncScript
    keys: Sequence[str]
    args: Sequence[Any]

    def packed(self) -> bytes:
        """Return the command as it is sent."""
        words = ("EVALSHA", self.script.sha, len(self.keys), *self.keys, *self.args)
        command: bytes = hiredis.pack_command(words)
        return command


class ScriptPipe:
    """The connection of a client for its scripts. It is opened, and replaced, when it is needed."""

    def __init__(self, pool: ConnectionSource) -> None:
        """`pool` knows the server, and how to connect to it."""
        self._pool = pool
        self._slots = asyncio.Semaphore(_MOST_UNDER_WAY)
        self._current: PipelinedConnection | None = None
        # Includes connections that will be closed after their last reply.
        self._open: set[PipelinedConnection] = set()
        self._connecting: asyncio.Task[PipelinedConnection] | None = None

    async def run(
        self, script: AsyncScript, keys: Sequence[str], args: Sequence[Any], *, urgent: bool = False
    ) -> Any:
        """Run a script and return its reply, before other calls of this moment if it is `urgent`.

        If the call is cancelled, the script may still run.

        Raises:
            NoReplyError: it may or may not have run.
            redis.exceptions.RedisError, OSError: it did not run, or it failed.
        """
        (reply,) = await self.run_all((ScriptCall(script, keys, args),), urgent=urgent)
        if isinstance(reply, Exception):
            raise reply
        return reply

    async def run_all(self, calls: Sequence[ScriptCall], *, urgent: bool = False) -> list[Any]:
        """Send several calls in one write and return their replies in order.

        Redis runs them in this order, possibly with calls of others in between. If one fails, its
        reply is the error, and the others still run. A script that Redis does not know yet runs
        after the others.

        Raises:
            redis.exceptions.RedisError, OSError: none of them was sent.
        """
        commands = b"".join([call.packed() for call in calls])
        replies = await self._send(commands, len(calls), urgent=urgent)
        unknown = [n for n, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if unknown:
            answers = await self._teach([calls[n] for n in unknown])
            for n, reply in zip(unknown, answers, strict=True):
                replies[n] = reply
        return replies

    def leave(self) -> None:
        """Let the next calls use a new connection."""
        if self._current is not None:
            self._current.retire()
            self._current = None

    async def aclose(self) -> None:
        """Close the connection. The calls under way fail. A later call opens another one."""
        connecting, self._connecting = self._connecting, None
        if connecting is not None:
            connecting.cancel()
            await asyncio.wait([connecting])
        self._current = None
        for connection in tuple(self._open):
            await connection.aclose()

    async def _teach(self, calls: Sequence[ScriptCall]) -> list[Any]:
        """Send scripts to Redis and run them."""
        commands = b""
        for call in calls:
            load: Any = ("SCRIPT", "LOAD", call.script.script)
            commands += hiredis.pack_command(load) + call.packed()
        try:
            replies = await self._send(commands, 2 * len(calls))
        except (RedisError, OSError) as error:
            return [error] * len(calls)
        pairs = zip(replies[::2], replies[1::2], strict=True)
        # If Redis refused to load a script, that error is the reason.
        return [load if isinstance(load, Exception) else reply for load, reply in pairs]

    async def _send(self, commands: bytes, count: int, *, urgent: bool = False) -> list[Any]:
        if self._slots.locked():
            await self._wait_for_slot()
        else:
            await self._slots.acquire()
        try:
            connection = self._current
            while connection is None or not (connection.is_usable and connection.is_writable):
                connection = await self._next()
            replies = connection.write(commands, count, urgent=urgent)
        except BaseException:
            self._slots.release()
            raise
        return await replies

    async def _wait_for_slot(self) -> None:
        limit: float | None = self._pool.connection_kwargs.get("socket_timeout")
        try:
            async with asyncio.timeout(limit):
                await self._slots.acquire()
        except TimeoutError:
            text = f"{_MOST_UNDER_WAY} calls of Redis are under way"
            raise RedisTimeoutError(text) from None

    async def _next(self) -> PipelinedConnection:
        """Return a connection that was usable and writable a moment ago."""
        current = self._current
        if current is not None and current.is_usable:
            await current.until_writable()
            return current
        self.leave()
        if self._connecting is None:
            # A task, because the caller that comes first may be cancelled.
            self._connecting = asyncio.create_task(self._connect(), name="connect to Redis")
        connecting = self._connecting
        try:
            return await asyncio.shield(connecting)
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if connecting.cancelled() and caller is not None and not caller.cancelling():
                raise RedisConnectionError("the client was closed") from None
            raise

    async def _connect(self) -> PipelinedConnection:
        connection = self._pool.make_connection()
        try:
            await self._pool.ensure_connection(connection)
            opened = PipelinedConnection(
                connection, self._pool, self._slots.release, self._open.discard
            )
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        finally:
            self._connecting = None
        self._open.add(opened)
        self._current = opened
        return opened
