"""The drill's production configuration: what it refuses, and how its processes are replaced."""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import psycopg
import pytest
import redis.asyncio
from outbox.v1.sender_pb2 import Sender
from outbox.v1.sender_service_pb2 import CreateSenderRequest
from outbox.v1.sender_service_pb2_grpc import SenderServiceStub
from redis.exceptions import AuthenticationError
from redis.exceptions import ConnectionError as RedisConnectionError
from typer.testing import CliRunner

from outbox_server.cli.main import app
from outbox_server.deploy.drill.hostile import HOSTILE_USER
from outbox_server.deploy.drill.load import USER
from outbox_server.deploy.drill.rolling import RollingRestart
from outbox_server.deploy.drill.stack import DrillStack, Size, drill_settings
from outbox_server.deploy.ports import LOOPBACK

SIZE = Size(dispatchers=1, schedulers=1, stats=1)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Not pytest's own folder, which only its owner may enter."""
    path = Path(tempfile.mkdtemp(prefix="outbox-production-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
async def stack(folder: Path) -> AsyncIterator[DrillStack]:
    stack = DrillStack(folder, SIZE, drill_settings("resend"), print, production=True)
    async with stack:
        yield stack


async def create_sender(address: str, credentials: grpc.ChannelCredentials | None) -> str:
    """Return the id of a new sender, or the code of the error."""
    channel = (
        grpc.aio.insecure_channel(address)
        if credentials is None
        else grpc.aio.secure_channel(address, credentials)
    )
    request = CreateSenderRequest(user_id=USER, sender=Sender(email="a@b.example"))
    async with channel:
        try:
            return (await SenderServiceStub(channel).CreateSender(request, timeout=30)).sender_id
        except grpc.aio.AioRpcError as error:
            return error.code().name


async def test_every_connection_needs_tls_and_a_secret_and_processes_are_replaced_without_a_gap(
    stack: DrillStack, folder: Path
) -> None:
    (address,) = stack.schedulers
    services = folder / "services" / f"{LOOPBACK}.crt"
    only_tls = grpc.ssl_channel_credentials(services.read_bytes())
    of_stores = grpc.ssl_channel_credentials((folder / f"{LOOPBACK}.crt").read_bytes())
    known = stack.credentials
    assert known is not None
    assert (await create_sender(address, known[USER])).isdecimal()
    assert await create_sender(address, known[HOSTILE_USER]) == "PERMISSION_DENIED"
    assert await create_sender(address, None) == "UNAVAILABLE"
    assert await create_sender(address, of_stores) == "UNAVAILABLE"
    assert await create_sender(address, only_tls) == "UNAUTHENTICATED"

    # The stores: neither without a password, nor without TLS where the services connect.
    password = stack.postgres.passwords.password_of("outbox")
    proxy = stack.proxies["postgres"].port
    for url, refusal in (
        (f"postgresql://outbox@{LOOPBACK}:{stack.postgres.port}/outbox", "no password supplied"),
        (f"postgresql://outbox:{password}@{LOOPBACK}:{proxy}/outbox?sslmode=disable", "closed"),
    ):
        with pytest.raises(psycopg.OperationalError, match=refusal):
            await psycopg.AsyncConnection.connect(url)
    for port, login, error in (
        (stack.valkey.port, None, AuthenticationError),
        (stack.proxies["redis"].port, urlsplit(stack.valkey.url).password, RedisConnectionError),
    ):
        async with redis.asyncio.Redis(host=LOOPBACK, port=port, password=login) as client:
            with pytest.raises(error):
                await client.ping()

    # No secret is in the environment of a service, where other programs could read it.
    rolling = RollingRestart(stack.system, stack.settings.shutdown_grace.total_seconds(), print)
    old = stack.service("scheduler", 1)
    variables = Path(f"/proc/{old.child.pid}/environ").read_text()  # noqa: ASYNC240 - in memory
    assert password not in variables
    assert "OUTBOX_DATABASE_URL_FILE=" in variables

    await rolling.replace(old)
    new = stack.service("scheduler", 1)
    assert (rolling.rolled.replaced, rolling.rolled.problems) == (1, [])
    assert new is not old
    assert not old.child.running
    assert await new.serving()
    assert (await create_sender(address, known[USER])).isdecimal()

    # A process that does not end by itself is killed, and is a problem.
    hanging = stack.service("stats", 1)
    hanging.child.signal(signal.SIGSTOP)
    assert not await stack.system.remove(hanging, 0.2)
    assert not hanging.child.running


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--faults", "rolling_restart"], "requires --production"),
        (["--production", "--dispatchers", "1"], "two processes or more"),
        (["--production", "--stores", "cluster"], "exclude each other"),
        (["--faults", "cluster_move"], "PgBouncer --stores cluster"),
        (["--stores", "cluster", "--faults", "redis_kill"], "one Redis require --stores single"),
    ],
)
def test_options_that_contradict_each_other_are_refused(words: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["drill", *words])
    assert result.exit_code == 2
    assert message in result.output.replace("\n", " ")
