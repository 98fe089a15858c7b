"""Scripts over one connection: the order of replies, errors, losses, limits and logins."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import hiredis
import pytest
import pytest_asyncio
import uvloop
from redis.commands.core import AsyncScript
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from outbox_server.deploy.certificates import self_signed, server_context
from outbox_server.deploy.embedded.proxy import TcpProxy
from outbox_server.shared.queue import connection, script_pipe
from outbox_server.shared.queue.connection import connect
from outbox_server.shared.queue.following import FollowingClient, departures_of
from outbox_server.shared.queue.pipelining import (
    NoReplyError,
    NoReplyInTimeError,
    PipelinedConnection,
)
from outbox_server.shared.queue.script_pipe import ScriptCall
from outbox_server.shared.settings import load_settings
from tests.conftest import Stores
from tests.eventually import PATIENCE, eventually

ECHO = "return ARGV[1]"
WRITE = "redis.call('SET', KEYS[1], ARGV[1]) return 'written'"
# Until SCRIPT KILL.
ENDLESS = "while true do end"
LIST = "redis.call('RPUSH', KEYS[1], ARGV[1]) return ARGV[1]"


class Scripts:
    """A client, and the scripts of these tests."""

    def __init__(self, client: FollowingClient) -> None:
        self.client = client
        self.pipe = client.scripts
        register = client.register_script
        self.echo, self.write, self.endless = register(ECHO), register(WRITE), register(ENDLESS)
        self.list = register(LIST)

    async def run(self, word: Any) -> Any:
        return await self.pipe.run(self.echo, (), (word,))

    async def set(self, value: str) -> Any:
        return await self.pipe.run(self.write, ("key",), (value,))

    def start(self, word: str) -> asyncio.Task[Any]:
        return asyncio.create_task(self.run(word))

    @property
    def current(self) -> PipelinedConnection:
        current = self.pipe._current
        assert current is not None
        return current

    def under_way(self) -> int:
        """Return the number of writes whose replies are awaited."""
        return len(self.current._waiting)


@asynccontextmanager
async def scripts_of(url: str) -> AsyncIterator[Scripts]:
    async with connect(load_settings(redis_url=url)) as client:
        yield Scripts(client)


@pytest_asyncio.fixture
async def scripts(redis_url: str) -> AsyncIterator[Scripts]:
    async with scripts_of(redis_url) as found:
        yield found


@pytest_asyncio.fixture
async def proxy(stores: Stores) -> AsyncIterator[TcpProxy]:
    async with TcpProxy(lambda: stores.redis.port) as proxy:
        yield proxy


@pytest_asyncio.fixture
async def proxied(redis_url: str, stores: Stores, proxy: TcpProxy) -> AsyncIterator[Scripts]:
    """Scripts of a client behind the proxy, which has connected."""
    async with scripts_of(redis_url.replace(str(stores.redis.port), str(proxy.port))) as found:
        await found.run("connected")
        yield found


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no call fail because the machine is busy."""
    monkeypatch.setattr(connection, "_CALL_LIMIT_S", PATIENCE)
    monkeypatch.setattr(connection, "_CONNECT_LIMIT_S", PATIENCE)


async def test_many_calls_at_once_use_one_connection_and_get_their_own_replies(
    scripts: Scripts,
) -> None:
    words = [f"{n} of {'ä' * (n % 50)} \r\n" for n in range(1000)]
    assert await asyncio.gather(*map(scripts.run, words)) == words
    assert len(scripts.pipe._open) == 1
    assert await scripts.run(b"bytes") == "bytes"
    assert await scripts.run(12) == "12"
    assert await scripts.run("x" * 3_000_000) == "x" * 3_000_000


async def test_urgent_calls_go_first_and_the_others_wait_for_one_of_them_at_most(
    scripts: Scripts,
) -> None:
    await scripts.client.script_load(LIST)
    await scripts.run("connected")

    async def note(word: str, *, urgent: bool = False) -> None:
        await scripts.pipe.run(scripts.list, ("words",), (word,), urgent=urgent)

    async def note_twice() -> None:
        await note("urgent 1", urgent=True)
        await note("urgent 2", urgent=True)

    await asyncio.gather(note("a"), note_twice(), note("b"))
    assert await scripts.client.lrange("words", 0, -1) == ["urgent 1", "a", "b", "urgent 2"]
    assert not scripts.under_way()


async def test_urgent_and_other_calls_in_any_order_get_their_own_replies(scripts: Scripts) -> None:
    async def call_often(number: int) -> None:
        chance = random.Random(number)
        for n in range(100):
            word, urgent = f"{n} of {number}", chance.random() < 0.5
            assert await scripts.pipe.run(scripts.echo, (), (word,), urgent=urgent) == word

    await asyncio.gather(*map(call_often, range(20)))
    assert not scripts.under_way()


async def test_an_urgent_call_does_not_wait_for_a_slow_script_of_the_same_moment(
    scripts: Scripts, redis_url: str
) -> None:
    for script in (scripts.endless, scripts.echo):
        await scripts.client.script_load(str(script.script))
    async with scripts_of(redis_url) as others:
        await others.run("connected")
        slow = asyncio.create_task(others.pipe.run(others.endless, (), ()))
        urgent = asyncio.create_task(others.pipe.run(others.echo, (), ("word",), urgent=True))
        try:
            assert await urgent == "word"
            assert not slow.done()
        finally:

            async def is_killed() -> bool:
                with suppress(ResponseError):  # it has not begun
                    await scripts.client.script_kill()
                return slow.done()

            await eventually(is_killed)
        with pytest.raises(ResponseError):
            await slow


async def test_calls_that_wait_for_an_urgent_one_fail_with_the_connection(
    proxied: Scripts, proxy: TcpProxy
) -> None:
    proxy.hang()
    urgent = asyncio.create_task(proxied.pipe.run(proxied.echo, (), ("1",), urgent=True))
    tasks = [urgent, proxied.start("2")]
    await eventually(lambda: proxied.under_way() == 2)
    tasks.append(proxied.start("3"))
    await eventually(lambda: proxied.under_way() == 3)
    proxy.cut()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(each) for each in found] == [NoReplyError] * 3
    proxy.heal()
    assert await proxied.run("again") == "again"


async def test_a_cancelled_call_does_not_disturb_the_others(
    proxied: Scripts, proxy: TcpProxy
) -> None:
    proxy.hang()
    tasks = [proxied.start(f"{n}") for n in range(9)]
    await eventually(lambda: proxied.under_way() == 9)
    for task in tasks[::3]:
        task.cancel()
    await asyncio.wait(tasks[::3])
    tasks.append(proxied.start("9"))
    proxy.heal()

    found = await asyncio.gather(*tasks, return_exceptions=True)
    for n, reply in enumerate(found):
        if n % 3 == 0 and n < 9:
            assert isinstance(reply, asyncio.CancelledError)
        else:
            assert reply == f"{n}"
    assert await proxied.run("after") == "after"


async def test_a_script_that_redis_forgot_is_sent_again_and_runs_once(scripts: Scripts) -> None:
    count = scripts.client.register_script("return redis.call('INCR', KEYS[1])")
    assert await scripts.pipe.run(count, ("count",), ()) == 1
    await scripts.client.script_flush()
    assert await scripts.pipe.run(count, ("count",), ()) == 2
    # Redis keeps it.
    assert await scripts.client.script_exists(count.sha) == [True]


async def test_an_error_of_one_call_and_a_forgotten_script_leave_the_others_alone(
    scripts: Scripts,
) -> None:
    register = scripts.client.register_script
    good, bad = register("return {'good', ARGV[1]}"), register("return redis.call('NOTHING')")
    for script in (good, bad):
        await scripts.client.script_load(str(script.script))
    forgotten = register("return 'taught ' .. ARGV[1]")
    calls = [ScriptCall(script, (), ("1",)) for script in (good, bad, forgotten, good)]

    first, second, third, fourth = await scripts.pipe.run_all(calls)
    assert first == fourth == ["good", "1"]
    assert isinstance(second, ResponseError)
    assert "NOTHING" in str(second) or "nknown" in str(second)
    assert third == "taught 1"
    with pytest.raises(ResponseError):
        await scripts.pipe.run(bad, (), ())
    assert await scripts.run("after") == "after"


async def test_a_broken_script_fails_alone(scripts: Scripts) -> None:
    broken = scripts.client.register_script("this is no Lua")
    replies = await scripts.pipe.run_all(
        [ScriptCall(script, (), ("1",)) for script in (scripts.echo, broken)]
    )
    assert replies[0] == "1"
    assert isinstance(replies[1], ResponseError)
    assert not isinstance(replies[1], NoScriptError)


async def test_calls_whose_connection_is_lost_may_have_run_and_the_next_call_connects_again(
    proxied: Scripts, proxy: TcpProxy, scripts: Scripts
) -> None:
    for script in (proxied.write, proxied.endless):
        await scripts.client.script_load(str(script.script))
    await scripts.client.config_set("busy-reply-threshold", 1)
    try:
        both = asyncio.create_task(
            proxied.pipe.run_all(
                [
                    ScriptCall(proxied.write, ("key",), ("value",)),
                    ScriptCall(proxied.endless, (), ()),
                ]
            )
        )

        async def is_busy() -> bool:
            try:
                await scripts.client.ping()
            except ResponseError as error:
                return "BUSY" in str(error)
            return False

        # The first script has run. Redis sends its reply after the second one.
        await eventually(is_busy)
        other = proxied.start("also")
        await eventually(lambda: proxied.under_way() == 2)
        proxy.cut()
        replies = await both
        with pytest.raises(NoReplyError):
            await other
    finally:
        await scripts.client.script_kill()

        async def is_free() -> bool:
            return not await is_busy()

        await eventually(is_free)
        await scripts.client.config_set("busy-reply-threshold", 5000)

    assert [type(reply) for reply in replies] == [NoReplyError, NoReplyError]
    assert await scripts.client.get("key") == "value"
    assert await proxied.run("again") == "again"


async def test_a_hung_connection_fails_all_its_calls_in_time_and_is_replaced(
    redis_url: str, stores: Stores, proxy: TcpProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = redis_url.replace(str(stores.redis.port), str(proxy.port))
    monkeypatch.setattr(connection, "_CALL_LIMIT_S", 0.3)
    async with scripts_of(url) as scripts:

        async def runs() -> bool:
            try:
                return bool(await scripts.run("word") == "word")
            except RedisTimeoutError:
                return False  # the machine is busy

        await eventually(runs)
        hung = scripts.current
        proxy.hang()
        tasks = [scripts.start("1"), scripts.start("2")]
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(each) for each in found] == [NoReplyInTimeError, NoReplyInTimeError]
        assert not hung.is_usable
        proxy.heal()
        await eventually(runs)
        assert scripts.current is not hung
        await eventually(lambda: scripts.pipe._open == {scripts.current})


async def test_a_slow_script_fails_alone_and_the_calls_behind_it_get_their_replies(
    scripts: Scripts, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for script in (scripts.endless, scripts.echo):
        await scripts.client.script_load(str(script.script))
    await scripts.client.config_set("busy-reply-threshold", 1)
    monkeypatch.setattr(connection, "_CALL_LIMIT_S", 3.0)
    async with scripts_of(redis_url) as limited:
        await limited.run("connected")
        slow = limited.current
        late = asyncio.create_task(limited.pipe.run(limited.endless, (), ()))
        # Sent at once with it: Redis does not read what comes behind a script that it runs.
        others = [limited.start(f"{n}") for n in range(5)]
        try:
            with pytest.raises(NoReplyInTimeError):
                await late
        finally:
            await scripts.client.script_kill()
        try:
            assert await asyncio.gather(*others) == [f"{n}" for n in range(5)]
        finally:
            # Not before: the script may run on for a moment after SCRIPT KILL was answered.
            await scripts.client.config_set("busy-reply-threshold", 5000)
        assert not slow.is_usable
        assert await limited.run("again") == "again"
        await eventually(lambda: limited.pipe._open == {limited.current})
        assert limited.pipe._slots._value == script_pipe._MOST_UNDER_WAY


async def test_an_idle_connection_that_the_server_closed_costs_no_call(
    proxied: Scripts, proxy: TcpProxy
) -> None:
    before = proxied.current
    proxy.cut()
    await eventually(lambda: not before.is_usable)
    assert await proxied.run("again") == "again"


async def test_calls_beyond_the_bound_wait_for_their_turn(
    redis_url: str, stores: Stores, proxy: TcpProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script_pipe, "_MOST_UNDER_WAY", 2)
    url = redis_url.replace(str(stores.redis.port), str(proxy.port))
    async with scripts_of(url) as scripts:
        await scripts.run("connected")
        proxy.hang()
        tasks = [scripts.start(f"{n}") for n in range(6)]
        waiting = scripts.pipe._slots
        await eventually(lambda: len(waiting._waiters or ()) == 4)
        assert scripts.under_way() == 2
        # One that waits, and one that is under way.
        for task in (tasks.pop(4), tasks.pop(1)):
            task.cancel()
            await asyncio.wait([task])
        assert scripts.under_way() == 2
        proxy.heal()
        assert await asyncio.gather(*tasks) == ["0", "2", "3", "5"]
        assert waiting._value == 2


async def test_a_call_that_finds_no_room_in_time_was_not_sent(
    redis_url: str, stores: Stores, proxy: TcpProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script_pipe, "_MOST_UNDER_WAY", 1)
    url = redis_url.replace(str(stores.redis.port), str(proxy.port))
    async with scripts_of(url) as scripts:
        await scripts.run("connected")
        proxy.hang()
        first = scripts.start("1")
        await eventually(lambda: scripts.under_way() == 1)
        # Only the wait for room is limited so, not the call under way.
        monkeypatch.setitem(scripts.client.connection_pool.connection_kwargs, "socket_timeout", 0.1)
        with pytest.raises(RedisTimeoutError, match="1 calls of Redis are under way") as error:
            await scripts.set("value")
        assert not isinstance(error.value, NoReplyError)
        proxy.heal()
        assert await first == "1"
        assert await scripts.client.get("key") is None


async def test_a_server_that_reads_too_slowly_holds_further_calls_back(
    proxied: Scripts, proxy: TcpProxy
) -> None:
    proxy.hang()
    large = "x" * 16_000_000
    first = proxied.start(large)
    await eventually(lambda: not proxied.current.is_writable)
    second = proxied.start("second")
    cancelled = proxied.start("cancelled")
    # Both get a slot, and neither is written.
    await eventually(lambda: proxied.pipe._slots._value == script_pipe._MOST_UNDER_WAY - 3)
    assert proxied.under_way() == 1
    cancelled.cancel()
    await asyncio.wait([cancelled])
    proxy.heal()
    assert await first == large
    assert await second == "second"
    assert proxied.pipe._slots._value == script_pipe._MOST_UNDER_WAY


async def test_the_cancellation_of_the_first_caller_does_not_end_the_connecting_of_all(
    redis_url: str, stores: Stores, proxy: TcpProxy
) -> None:
    url = redis_url.replace(str(stores.redis.port), str(proxy.port))
    async with scripts_of(url) as scripts:
        proxy.hang()
        tasks = [scripts.start(f"{n}") for n in range(3)]
        await eventually(lambda: len(proxy._pairs) == 1)
        tasks[0].cancel()
        await asyncio.wait(tasks[:1])
        proxy.heal()
        assert await asyncio.gather(*tasks[1:]) == ["1", "2"]
        assert len(proxy._pairs) == 1
        assert scripts.pipe._slots._value == script_pipe._MOST_UNDER_WAY


async def test_all_callers_learn_why_there_is_no_connection(proxy: TcpProxy) -> None:
    proxy.refuse()
    async with scripts_of(f"redis://127.0.0.1:{proxy.port}") as scripts:
        found = await asyncio.gather(
            *(scripts.run(f"{n}") for n in range(3)), return_exceptions=True
        )
        assert {type(each) for each in found} == {RedisConnectionError}
        assert scripts.pipe._slots._value == script_pipe._MOST_UNDER_WAY


async def test_closing_the_client_fails_the_calls_under_way(
    proxied: Scripts, proxy: TcpProxy
) -> None:
    proxy.hang()
    written = proxied.start("written")
    await eventually(lambda: proxied.under_way() == 1)
    await proxied.client.aclose()
    with pytest.raises(NoReplyError, match="closed"):
        await written
    # One that connects.
    connecting = proxied.start("connecting")
    await eventually(lambda: proxied.pipe._connecting is not None)
    await proxied.client.aclose()
    with pytest.raises(RedisConnectionError, match="closed"):
        await connecting
    proxy.heal()
    assert await proxied.run("again") == "again"


async def test_a_reply_that_is_no_text_ends_the_connection_and_not_the_client(
    scripts: Scripts,
) -> None:
    odd = scripts.client.register_script(r"return '\255'")
    with pytest.raises(NoReplyError):
        await scripts.pipe.run(odd, (), ())
    assert await scripts.run("again") == "again"


async def test_messages_that_no_call_asked_for_are_not_taken_for_replies(
    scripts: Scripts, redis_url: str
) -> None:
    words: Any = ("CLIENT", "TRACKING", "ON", "BCAST")
    await scripts.run("connected")
    assert await scripts.pipe._send(hiredis.pack_command(words), 1) == ["OK"]
    async with scripts_of(redis_url) as other:
        for n in range(20):
            await other.set(f"{n}")
            assert await scripts.run(f"{n}") == f"{n}"


async def test_a_server_that_refuses_writes_is_left_after_the_calls_under_way(
    scripts: Scripts,
) -> None:
    await scripts.run("connected")
    left = scripts.current
    await scripts.client.config_set("min-replicas-to-write", 1)
    try:
        calls = [
            ScriptCall(scripts.write, ("key",), ("value",)),
            ScriptCall(scripts.echo, (), ("echo",)),
        ]
        refused, echoed = await scripts.pipe.run_all(calls)
    finally:
        await scripts.client.config_set("min-replicas-to-write", 0)
    assert "NOREPLICAS" in str(refused)
    assert echoed == "echo"
    assert departures_of(scripts.client) == 1
    assert await scripts.set("value") == "written"
    assert scripts.current is not left
    await eventually(lambda: scripts.pipe._open == {scripts.current})


async def test_a_server_that_another_connection_left_is_left_after_the_calls_under_way(
    proxied: Scripts, proxy: TcpProxy
) -> None:
    left = proxied.current
    proxy.hang()
    under_way = proxied.start("under way")
    await eventually(lambda: proxied.under_way() == 1)
    proxied.client.connection_pool.leave(ResponseError("READONLY"))  # type: ignore[attr-defined]
    next_one = proxied.start("next")
    await eventually(lambda: len(proxy._pairs) == 2)
    proxy.heal()
    assert [await under_way, await next_one] == ["under way", "next"]
    assert proxied.current is not left
    await eventually(lambda: proxied.pipe._open == {proxied.current})


async def test_a_user_with_a_name_and_another_database_are_used(
    scripts: Scripts, stores: Stores
) -> None:
    administrate: Any = scripts.client.execute_command
    rights = ("on", ">secret", "~key", "+@read", "+@write", "+@scripting", "+@connection")
    await administrate("ACL", "SETUSER", "clerk", *rights)
    try:
        url = f"redis://clerk:secret@127.0.0.1:{stores.redis.port}/3?client_name=pipe"
        async with scripts_of(url) as clerk:
            assert await clerk.set("value") == "written"
            clients: Any = await scripts.client.client_list()
            (found,) = [each for each in clients if each["name"] == "pipe"]
            assert [found["user"], found["db"]] == ["clerk", "3"]
            with pytest.raises(ResponseError, match="permission") as refused:
                await clerk.pipe.run(clerk.write, ("forbidden",), ("value",))
            assert not isinstance(refused.value, NoReplyError)
            assert await clerk.run("after") == "after"
        assert await scripts.client.get("key") is None
    finally:
        await administrate("ACL", "DELUSER", "clerk")


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
@pytest.mark.parametrize("with_tls", [False, True])
def test_it_works_with_both_event_loops_and_with_tls(
    stores: Stores,
    redis_url: str,
    tmp_path: Path,
    loop_factory: Callable[[], asyncio.AbstractEventLoop],
    *,
    with_tls: bool,
) -> None:
    certificate = self_signed(tmp_path / "certificate")
    tls = server_context(certificate) if with_tls else None

    async def try_it() -> None:
        async with TcpProxy(lambda: stores.redis.port, tls) as proxy:
            url = redis_url.replace(str(stores.redis.port), str(proxy.port))
            if with_tls:
                url = url.replace("redis://", "rediss://") + f"?ssl_ca_certs={certificate.public}"
            async with scripts_of(url) as scripts:
                words = [f"{n}" * n for n in range(100)]
                assert await asyncio.gather(*map(scripts.run, words)) == words
                large = "x" * 2_000_000
                assert await scripts.run(large) == large
                proxy.hang()
                lost = scripts.start("lost")
                await eventually(lambda: scripts.under_way() == 1)
                proxy.cut()
                with pytest.raises(NoReplyError):
                    await lost
                proxy.heal()
                scripts.pipe.leave()
                assert await scripts.run("again") == "again"

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(try_it())


def test_the_arguments_of_a_call_are_packed_as_redis_expects(redis_url: str) -> None:
    client = connect(load_settings(redis_url=redis_url))
    script = AsyncScript(client, "return 1")
    packed = ScriptCall(script, ("kä",), (1, b"\xff", "")).packed()
    assert packed == (
        b"*7\r\n$7\r\nEVALSHA\r\n$40\r\n%s\r\n$1\r\n1\r\n$3\r\nk\xc3\xa4\r\n$1\r\n1\r\n$1\r\n\xff\r\n$0\r\n\r\n"
        % script.sha.encode()
    )
