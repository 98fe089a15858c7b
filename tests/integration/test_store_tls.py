"""TLS to PostgreSQL and Redis, as their URLs request it; docs/kubernetes.md has the same URLs.

The embedded servers have no TLS, so a proxy adds it. The proxy cannot answer libpq's request for
TLS within a connection; with `sslnegotiation=direct` libpq begins with TLS.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from sqlalchemy.exc import OperationalError

from outbox_server.deploy.certificates import Certificate, self_signed, server_context
from outbox_server.deploy.embedded.proxy import TcpProxy
from outbox_server.shared.database.engine import create_engine
from outbox_server.shared.database.schema import read_revision
from outbox_server.shared.queue.connection import connect
from outbox_server.shared.settings import load_settings
from tests.conftest import Stores


@pytest.fixture
def ours(tmp_path: Path) -> Certificate:
    return self_signed(tmp_path / "ours")


@pytest.fixture
def another(tmp_path: Path) -> Certificate:
    return self_signed(tmp_path / "another")


@asynccontextmanager
async def with_tls(port: int, certificate: Certificate) -> AsyncIterator[int]:
    context = server_context(certificate)
    context.set_alpn_protocols(["postgresql"])
    async with TcpProxy(lambda: port, context) as proxy:
        yield proxy.port


async def test_postgresql_is_reached_with_tls_and_its_certificate_is_verified(
    stores: Stores, database_url: str, ours: Certificate, another: Certificate
) -> None:
    async with with_tls(stores.postgres.port, ours) as port:

        async def try_with(ca: Path) -> None:
            url = database_url.replace(str(stores.postgres.port), str(port))
            tls = f"sslmode=verify-full&sslrootcert={ca}&sslnegotiation=direct"
            engine = create_engine(load_settings(database_url=f"{url}&{tls}"))
            try:
                await read_revision(engine)
            finally:
                await engine.dispose()

        await try_with(ours.public)
        with pytest.raises(OperationalError, match="certificate verify failed"):
            await try_with(another.public)


async def test_redis_is_reached_with_tls_and_its_certificate_is_verified(
    stores: Stores, redis_url: str, ours: Certificate, another: Certificate
) -> None:
    async with with_tls(stores.redis.port, ours) as port:

        async def try_with(ca: Path) -> None:
            url = redis_url.replace("redis://", "rediss://")
            url = url.replace(str(stores.redis.port), str(port))
            client = connect(load_settings(redis_url=f"{url}?ssl_ca_certs={ca}"))
            try:
                assert await client.ping()
            finally:
                await client.aclose()

        await try_with(ours.public)
        with pytest.raises(RedisConnectionError, match="certificate verify failed"):
            await try_with(another.public)
