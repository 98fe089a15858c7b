"""The single timer of a connection, and the events that end a wait on it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from outbox_server.services.dispatcher.smtp.lease import Lease
from outbox_server.shared.smtp.limits import FixedDeadline
from outbox_server.shared.smtp.reply_parser import MalformedReply
from outbox_server.shared.smtp.stream import ConnectionLost, SmtpStream
from tests.eventually import eventually


class Peer:
    """The other end of a connection."""

    def __init__(self) -> None:
        self.writer: asyncio.StreamWriter | None = None
        self.come = asyncio.Event()

    async def __call__(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.come.set()

    def say(self, data: bytes) -> None:
        assert self.writer is not None
        self.writer.write(data)

    def close(self) -> None:
        assert self.writer is not None
        self.writer.close()


@pytest.fixture
async def peer() -> Peer:
    return Peer()


@pytest.fixture
async def stream(peer: Peer) -> AsyncIterator[SmtpStream]:
    server = await asyncio.start_server(peer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    stream = SmtpStream()
    await asyncio.get_running_loop().create_connection(lambda: stream, "127.0.0.1", port)
    await peer.come.wait()
    yield stream
    stream.abort()
    peer.close()
    server.close()
    await server.wait_closed()


async def test_consecutive_waits_have_separate_limits(stream: SmtpStream, peer: Peer) -> None:
    """The timer of a long wait must not apply to a short one, and vice versa."""
    for seconds in (60.0, 0.05, 60.0, 0.05):
        waiting = asyncio.create_task(stream.reply(seconds, FixedDeadline(60)))
        if seconds < 1:
            with pytest.raises(TimeoutError):
                await waiting
        else:
            peer.say(b"250 ok\r\n")
            assert (await waiting).code == 250


async def test_a_short_timer_that_fires_in_a_later_wait_does_not_end_it(
    stream: SmtpStream, peer: Peer
) -> None:
    peer.say(b"250 one\r\n")
    await stream.reply(0.05, FixedDeadline(60))
    waiting = asyncio.create_task(stream.reply(60, FixedDeadline(60)))
    fired = time.monotonic() + 0.1
    await eventually(lambda: time.monotonic() > fired)
    assert not waiting.done()
    peer.say(b"250 two\r\n")
    assert (await waiting).text == "two"


async def test_moving_the_deadline_moves_the_end_of_the_wait(
    stream: SmtpStream, peer: Peer
) -> None:
    lease = Lease(time.monotonic() + 60)
    waiting = asyncio.create_task(stream.reply(60, lease))
    await asyncio.sleep(0)
    # Without a turn of the event loop between, so that the first end cannot pass before it moves.
    lease.extend(time.monotonic() + 0.1)
    first = lease.until
    lease.extend(time.monotonic() + 60)
    await eventually(lambda: time.monotonic() > first + 0.1)
    assert not waiting.done()
    lease.extend(time.monotonic())
    with pytest.raises(TimeoutError):
        await waiting
    peer.say(b"250 late\r\n")
    assert (await stream.reply(60, FixedDeadline(60))).text == "late"


async def test_a_deadline_in_the_past_ends_a_wait_at_once(stream: SmtpStream) -> None:
    with pytest.raises(TimeoutError):
        await stream.reply(60, Lease(time.monotonic() - 1))


@pytest.mark.parametrize("before", [b"", b"250", b"250-a\r\n"])
async def test_an_end_of_the_connection_ends_a_wait(
    stream: SmtpStream, peer: Peer, before: bytes
) -> None:
    peer.say(before)
    waiting = asyncio.create_task(stream.reply(60, FixedDeadline(60)))
    peer.close()
    with pytest.raises(ConnectionLost, match="the server closed the connection"):
        await waiting
    assert not stream.connected
    with pytest.raises(ConnectionLost):
        stream.write(b"QUIT\r\n")


async def test_a_reply_just_before_the_connection_ends_is_read(
    stream: SmtpStream, peer: Peer
) -> None:
    peer.say(b"421 bye\r\n")
    peer.close()
    assert (await stream.reply(60, FixedDeadline(60))).code == 421
    with pytest.raises(ConnectionLost):
        await stream.reply(60, FixedDeadline(60))


async def test_a_reply_that_is_not_smtp_closes_the_connection_permanently(
    stream: SmtpStream, peer: Peer
) -> None:
    peer.say(b"hello\r\n")
    for _ in range(2):
        with pytest.raises(MalformedReply, match="the server does not speak SMTP"):
            await stream.reply(60, FixedDeadline(60))
    peer.say(b"250 ok\r\n")
    assert not stream.connected


async def test_an_abort_ends_a_wait(stream: SmtpStream) -> None:
    waiting = asyncio.create_task(stream.reply(60, FixedDeadline(60)))
    await asyncio.sleep(0)
    stream.abort()
    with pytest.raises(ConnectionLost):
        await waiting
