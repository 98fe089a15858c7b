"""The proxy that refuses, hangs, delays and cuts connections, before a real server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError

from outbox_server.deploy.certificates import self_signed, server_context
from outbox_server.deploy.embedded.proxy import TcpProxy
from outbox_server.deploy.ports import LOOPBACK
from tests.conftest import Stores
from tests.eventually import eventually


@pytest.fixture
async def proxy(stores: Stores, redis_url: str) -> AsyncIterator[TcpProxy]:
    assert redis_url
    async with TcpProxy(lambda: stores.redis.port) as proxy:
        yield proxy


@pytest.fixture
async def client(stores: Stores, proxy: TcpProxy) -> AsyncIterator[Redis]:
    """One connection that is never reopened automatically."""
    never = Retry(NoBackoff(), 0)
    async with Redis(
        host=LOOPBACK,
        port=proxy.port,
        password=stores.redis.password,
        single_connection_client=True,
        retry=never,
    ) as client:
        yield client


async def test_the_proxy_forwards_both_ways(client: Redis) -> None:
    value = b"x" * 1_000_000
    await client.set("a", value)
    assert await client.get("a") == value


async def test_the_proxy_refuses_and_heals_repeatedly_on_the_same_port(
    proxy: TcpProxy, client: Redis
) -> None:
    for _ in range(3):
        assert await client.ping()
        proxy.refuse()
        proxy.refuse()
        with pytest.raises(RedisConnectionError):
            await client.ping()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(LOOPBACK, proxy.port)
        proxy.heal()
        proxy.heal()


async def test_a_cut_ends_only_existing_connections(proxy: TcpProxy, client: Redis) -> None:
    assert await client.ping()
    proxy.cut()
    with pytest.raises(RedisConnectionError):
        await client.ping()
    assert await client.ping()


async def test_delayed_data_arrives_complete(proxy: TcpProxy, client: Redis) -> None:
    assert await client.ping()
    proxy.lag(0.1)
    began = time.monotonic()
    assert await client.incr("n") == 1
    assert time.monotonic() - began >= 0.2, "both ways"
    proxy.heal()
    assert await client.incr("n") == 2


async def test_the_proxy_presents_its_current_certificate(stores: Stores, tmp_path: Path) -> None:
    trusted, other = self_signed(tmp_path), self_signed(tmp_path / "other")
    context = server_context(trusted)
    async with TcpProxy(lambda: stores.redis.port, context) as proxy:
        login = f":{stores.redis.password}@"
        url = f"rediss://{login}{LOOPBACK}:{proxy.port}?ssl_ca_certs={trusted.public}"
        never = Retry(NoBackoff(), 0)
        for certificate in (trusted, other, trusted):
            context.load_cert_chain(*certificate)
            async with Redis.from_url(url, retry=never) as client:
                if certificate is trusted:
                    assert await client.ping()
                    continue
                with pytest.raises(RedisConnectionError, match="certificate verify failed"):
                    await client.ping()


async def test_data_held_back_by_a_hang_arrives_after_it(proxy: TcpProxy, client: Redis) -> None:
    assert await client.ping()
    proxy.hang()
    slow = asyncio.ensure_future(client.incr("n"))
    _, writer = await asyncio.open_connection(LOOPBACK, proxy.port)
    done, _ = await asyncio.wait({slow}, timeout=0.1)
    assert not done
    proxy.heal()
    assert await slow == 1
    writer.close()


async def test_a_command_of_a_client_that_gave_up_is_executed_later(
    proxy: TcpProxy, client: Redis, redis: Redis
) -> None:
    assert await client.ping()
    proxy.hang()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(client.incr("n"), 0.05)
    await client.aclose()
    assert await redis.get("n") is None
    proxy.heal()
    await eventually(lambda: redis.get("n"))
