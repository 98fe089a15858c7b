"""OUTBOX_AUTH=keys: a real scheduler, its database, and keys of every kind."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import psycopg
import pytest
import structlog
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from outbox.v1 import (
    batch_service_pb2_grpc,
    dispatcher_service_pb2,
    sender_pb2,
    sender_service_pb2,
    stats_service_pb2,
    stats_service_pb2_grpc,
)
from sqlalchemy.ext.asyncio import AsyncEngine
from typer.testing import CliRunner, Result

from outbox_server.cli.main import app
from outbox_server.shared.auth import authenticator as key_authenticator
from outbox_server.shared.auth.authenticator import CACHE_TIME, KeyAuthenticator
from outbox_server.shared.auth.keys import ApiKeyKind, make_key
from outbox_server.shared.auth.store import ApiKeyStore, insert_key, revoke_key
from outbox_server.shared.callers import Caller, CallerKind
from outbox_server.shared.database.engine import create_engine
from outbox_server.shared.errors import Unauthenticated
from outbox_server.shared.rpc.server import GrpcServer, ServiceBinding
from outbox_server.shared.settings import load_settings
from tests.conftest import Stores
from tests.dispatchers import options, running, settings_of
from tests.eventually import PATIENCE, eventually
from tests.scheduler_stack import Scheduler, refusal_of, running_scheduler


@pytest.fixture(autouse=True)
def _log_to_stderr() -> Iterator[None]:
    """Keep the output of the command alone on stdout."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    yield
    structlog.reset_defaults()


@pytest.fixture
async def engine(database_url: str) -> AsyncIterator[AsyncEngine]:
    engine = create_engine(load_settings(database_url=database_url))
    yield engine
    await engine.dispose()


@pytest.fixture
async def scheduler(database_url: str, redis_url: str) -> AsyncIterator[Scheduler]:
    async with running_scheduler(database_url, redis_url, auth="keys") as running_one:
        yield running_one


async def key(engine: AsyncEngine, kind: ApiKeyKind, user_id: str | None = None) -> str:
    new = make_key()
    async with engine.begin() as connection:
        await insert_key(connection, new, kind, user_id, "")
    return new.text


def bearer(text: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {text}"),)


def create(scheduler: Scheduler, text: str, user_id: str = "") -> Any:
    request = sender_service_pb2.CreateSenderRequest(
        user_id=user_id, sender=sender_pb2.Sender(email="news@example.com")
    )
    return scheduler.senders.CreateSender(request, metadata=bearer(text))


async def test_a_user_key_acts_for_its_user_without_a_user_id(
    scheduler: Scheduler, engine: AsyncEngine
) -> None:
    ann = await key(engine, ApiKeyKind.USER, "ann")
    assert (await create(scheduler, ann)).user_id == "ann"
    assert (await create(scheduler, ann, "ann")).user_id == "ann"


async def test_a_user_key_with_another_user_id_is_a_mismatch(
    scheduler: Scheduler, engine: AsyncEngine
) -> None:
    ann = await key(engine, ApiKeyKind.USER, "ann")
    refusal = await refusal_of(create(scheduler, ann, "bob"))
    assert (refusal.code, refusal.reason) == ("PERMISSION_DENIED", "USER_MISMATCH")


@pytest.mark.parametrize("kind", [ApiKeyKind.SERVICE, ApiKeyKind.OPERATOR])
async def test_a_service_key_acts_for_the_user_that_it_names(
    scheduler: Scheduler, engine: AsyncEngine, kind: ApiKeyKind
) -> None:
    backend = await key(engine, kind)
    assert (await create(scheduler, backend, "bob")).user_id == "bob"
    refusal = await refusal_of(create(scheduler, backend))
    assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "USER_ID_REQUIRED")


async def test_a_call_without_a_key_is_refused(scheduler: Scheduler) -> None:
    refusal = await refusal_of(scheduler.sender())
    assert (refusal.code, refusal.reason) == ("UNAUTHENTICATED", "API_KEY_MISSING")
    assert "authorization: Bearer" in refusal.message


async def test_all_invalid_keys_are_refused_with_the_same_message(
    scheduler: Scheduler, engine: AsyncEngine
) -> None:
    good = await key(engine, ApiKeyKind.SERVICE)
    other = make_key().text
    prefix, key_id, secret = good.split("_", 2)
    wrong_secret = "_".join((prefix, key_id, other.split("_", 2)[2]))
    metadata = [
        *(bearer(text) for text in (other, wrong_secret, f"{prefix}_{key_id}", secret, "")),
        (("authorization", f"Basic {good}"),),
        (*bearer(good), *bearer(good)),
    ]
    request = sender_service_pb2.ListSendersRequest(user_id="ann")
    refusals = {
        (refusal.code, refusal.reason, refusal.message)
        for each in metadata
        if (refusal := await refusal_of(scheduler.senders.ListSenders(request, metadata=each)))
    }
    assert {(code, reason) for code, reason, _ in refusals} == {
        ("UNAUTHENTICATED", "API_KEY_INVALID")
    }
    assert len(refusals) == 1
    await scheduler.senders.ListSenders(request, metadata=bearer(good))


async def test_an_upload_is_refused_before_its_first_message_is_read(
    scheduler: Scheduler,
) -> None:
    async with grpc.aio.insecure_channel(scheduler.address) as channel:
        call = batch_service_pb2_grpc.BatchServiceStub(channel).UploadBatch()
        assert await call.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_health_and_reflection_need_no_key(scheduler: Scheduler) -> None:
    async with grpc.aio.insecure_channel(scheduler.address) as channel:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        answers = [answer async for answer in reflection.ServerReflectionInfo(asked)]
    names = {service.name for service in answers[0].list_services_response.service}
    assert "outbox.v1.SenderService" in names


async def test_a_revoked_key_stops_within_the_cache_time(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=1_000.0)
    monkeypatch.setattr(key_authenticator, "time", SimpleNamespace(monotonic=lambda: clock.now))
    text = await key(engine, ApiKeyKind.SERVICE)
    authenticator = KeyAuthenticator(ApiKeyStore(engine), timedelta(seconds=0.3))
    backend = Caller(None, CallerKind.SERVICE)
    assert await authenticator.authenticate(bearer(text)) == backend
    async with engine.begin() as connection:
        assert await revoke_key(connection, text.split("_")[1])
    clock.now += 0.29
    assert await authenticator.authenticate(bearer(text)) == backend
    clock.now += 0.02
    with pytest.raises(Unauthenticated):
        await authenticator.authenticate(bearer(text))
    await authenticator.close()
    assert timedelta(seconds=5) >= CACHE_TIME  # as the command line and the documents state


class WatchedStatsServicer(stats_service_pb2_grpc.StatsServiceServicer):
    """Streams a message when a test requests one."""

    def __init__(self) -> None:
        self.next = asyncio.Semaphore(1)

    async def WatchSenderStats(
        self, request: stats_service_pb2.WatchSenderStatsRequest, context: Any
    ) -> AsyncIterator[stats_service_pb2.WatchSenderStatsResponse]:
        del request, context
        while True:
            await self.next.acquire()
            yield stats_service_pb2.WatchSenderStatsResponse()


async def test_a_stream_ends_when_its_key_is_revoked(engine: AsyncEngine) -> None:
    text = await key(engine, ApiKeyKind.SERVICE)
    servicer = WatchedStatsServicer()  # type: ignore[abstract]
    name = stats_service_pb2.DESCRIPTOR.services_by_name["StatsService"].full_name
    binding = ServiceBinding(
        name, partial(stats_service_pb2_grpc.add_StatsServiceServicer_to_server, servicer)
    )
    server = GrpcServer(load_settings(auth="keys"), "127.0.0.1:0", [binding], engine=engine)
    assert isinstance(server._authenticator, KeyAuthenticator)
    server._authenticator._cache_s = 0.1
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = stats_service_pb2_grpc.StatsServiceStub(channel)
        request = stats_service_pb2.WatchSenderStatsRequest(sender_id="1")
        stream = stub.WatchSenderStats(request, metadata=bearer(text), timeout=PATIENCE)
        await stream.read()
        servicer.next.release()
        await stream.read()
        async with engine.begin() as connection:
            await revoke_key(connection, text.split("_")[1])

        async def read_on() -> None:
            while True:
                servicer.next.release()
                await stream.read()

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_on()
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    await server.drain_and_stop(timedelta(seconds=1))


async def test_a_key_is_looked_up_once_for_many_calls(engine: AsyncEngine) -> None:
    text = await key(engine, ApiKeyKind.SERVICE)
    looks: list[str] = []

    class Counting(ApiKeyStore):
        async def find(self, key_id: str) -> Any:
            looks.append(key_id)
            return await super().find(key_id)

    authenticator = KeyAuthenticator(Counting(engine))
    await asyncio.gather(*(authenticator.authenticate(bearer(text)) for _ in range(50)))
    await authenticator.authenticate(bearer(text))
    await authenticator.close()
    assert len(looks) == 1


async def test_a_cancelled_caller_does_not_cancel_the_key_lookup_of_others(
    engine: AsyncEngine,
) -> None:
    text = await key(engine, ApiKeyKind.SERVICE)
    authenticator = KeyAuthenticator(ApiKeyStore(engine))
    first, second = (
        asyncio.create_task(authenticator.authenticate(bearer(text))) for _ in range(2)
    )
    await asyncio.wait({first}, timeout=0)
    first.cancel()
    assert await second == Caller(None, CallerKind.SERVICE)
    await authenticator.close()


async def test_the_last_use_is_written_at_most_once_a_minute(
    scheduler: Scheduler, engine: AsyncEngine
) -> None:
    text = await key(engine, ApiKeyKind.SERVICE)
    last_use = "SELECT last_used_at FROM api_keys"
    assert scheduler.value(last_use) is None
    await create(scheduler, text, "ann")
    await eventually(lambda: scheduler.value(last_use) is not None)

    noted = scheduler.value(last_use)
    store = ApiKeyStore(engine)
    await store.note_use(text.split("_")[1])
    assert scheduler.value(last_use) == noted
    scheduler.execute("UPDATE api_keys SET last_used_at = now() - interval '61 seconds'")
    await store.note_use(text.split("_")[1])
    assert scheduler.value(last_use) >= noted


async def test_without_postgresql_a_key_check_is_unavailable_and_not_unauthenticated(
    stores: Stores, database_url: str, redis_url: str
) -> None:
    async with running_scheduler(database_url, redis_url, auth="keys") as scheduler:
        await stores.postgres.stop()
        try:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await create(scheduler, make_key().text, "ann")
        finally:
            await stores.postgres.start()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    status = rpc_status.from_call(caught.value)
    assert status is not None
    kinds = [detail.TypeName() for detail in status.details]
    assert kinds == ["google.rpc.ErrorInfo", "google.rpc.RetryInfo"]
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.reason == "DATABASE_UNAVAILABLE"


async def test_the_dispatcher_requires_an_operator_key(
    database_url: str, redis_url: str, engine: AsyncEngine
) -> None:
    values = options(database_url, redis_url, "smtp://127.0.0.1:9", auth="keys")
    async with running(settings_of(values)) as dispatcher:
        asked = dispatcher_service_pb2.GetDispatcherStatusRequest()
        stub = dispatcher.stub
        for kind, user in ((ApiKeyKind.USER, "ann"), (ApiKeyKind.SERVICE, None)):
            text = await key(engine, kind, user)
            refusal = await refusal_of(stub.GetDispatcherStatus(asked, metadata=bearer(text)))
            assert (refusal.code, refusal.reason) == ("PERMISSION_DENIED", "OPERATOR_REQUIRED")
        text = await key(engine, ApiKeyKind.OPERATOR)
        assert (await stub.GetDispatcherStatus(asked, metadata=bearer(text))).concurrency == 5


class Shell:
    """Run `outbox` in this process; the only OUTBOX_* variables are those given."""

    def __init__(self, **variables: str) -> None:
        others = {name: None for name in os.environ if name.startswith("OUTBOX_")}
        self._environment: dict[str, str | None] = {**others, **variables}

    async def run(self, *argv: str) -> Result:
        # In a thread: the command runs its own event loop, and the server runs in this one.
        return await asyncio.to_thread(CliRunner().invoke, app, argv, env=self._environment)

    async def json(self, *argv: str) -> Any:
        done = await self.run(*argv, "-o", "json")
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)


async def test_the_command_creates_lists_uses_and_revokes_a_key(
    scheduler: Scheduler, tmp_path: Path
) -> None:
    shell = Shell(
        OUTBOX_DATABASE_URL=scheduler.settings.database_url,
        OUTBOX_SCHEDULER_LISTEN=scheduler.address,
    )
    made = await shell.json("keys", "create", "--user", "ann", "--name", "web")
    assert (made["kind"], made["user_id"], made["name"]) == ("USER", "ann", "web")
    assert made["key"].startswith(f"obx_{made['key_id']}_")
    with psycopg.connect(scheduler.settings.database_url) as connection:
        stored = str(connection.execute("SELECT * FROM api_keys").fetchall())
    assert made["key"].split("_", 2)[2] not in stored

    refused = await shell.run("senders", "list")
    assert refused.exit_code == 1
    assert "API_KEY_MISSING" in refused.stderr
    (tmp_path / "key").write_text(made["key"] + "\n")
    sender = await shell.json(
        "--api-key-file", str(tmp_path / "key"), "senders", "create", "--email", "a@example.com"
    )
    assert sender["user_id"] == "ann"
    with_variable = Shell(OUTBOX_API_KEY=made["key"], OUTBOX_SCHEDULER_LISTEN=scheduler.address)
    assert len((await with_variable.json("senders", "list"))["senders"]) == 1

    (listed,) = (await shell.json("keys", "list"))["keys"]
    assert listed["key_id"] == made["key_id"]
    assert "key" not in listed
    assert (await shell.json("keys", "list", "--user", "bob"))["keys"] == []
    revoked = await shell.json("keys", "revoke", made["key_id"])
    assert revoked["revoke_time"]
    unknown = await shell.run("keys", "revoke", "nothing")
    assert (unknown.exit_code, "no API key nothing" in unknown.stderr) == (1, True)


async def test_a_key_has_one_kind_and_is_never_sent_in_clear(database_url: str) -> None:
    shell = Shell(OUTBOX_DATABASE_URL=database_url, OUTBOX_API_KEY=make_key().text)
    for argv in ((), ("--user", "ann", "--operator"), ("--service", "--operator")):
        done = await shell.run("keys", "create", *argv)
        assert done.exit_code == 2
        assert "--service" in done.stderr
    refused = await shell.run("senders", "list", "--server", "192.0.2.1:50051")
    assert refused.exit_code == 1
    assert "in clear" in refused.stderr


async def test_a_key_made_before_the_database_is_registered_once_and_accepted(
    scheduler: Scheduler, tmp_path: Path
) -> None:
    made = await Shell().json("keys", "generate-api-key")
    (tmp_path / "key").write_text(made["key"] + "\n")
    shell = Shell(
        OUTBOX_DATABASE_URL=scheduler.settings.database_url,
        OUTBOX_SCHEDULER_LISTEN=scheduler.address,
        OUTBOX_API_KEY_FILE=str(tmp_path / "key"),
    )
    register = ("keys", "register", "--operator", "--name", "first")
    first, again = await shell.json(*register), await shell.json(*register)
    assert (first.pop("created"), again.pop("created")) == (True, False)
    assert first == again
    assert (first["key_id"], first["kind"], first["name"]) == (made["key_id"], "OPERATOR", "first")
    assert (await shell.run("senders", "list", "--user", "ann")).exit_code == 0


async def test_a_key_that_is_stored_differently_is_not_registered(database_url: str) -> None:
    key, other = make_key().text, make_key().text
    shell = Shell(OUTBOX_DATABASE_URL=database_url, OUTBOX_API_KEY=key)
    assert (await shell.run("keys", "register", "--user", "ann")).exit_code == 0

    async def refusal(*argv: str, api_key: str = key) -> str:
        shell = Shell(OUTBOX_DATABASE_URL=database_url, OUTBOX_API_KEY=api_key)
        done = await shell.run("keys", "register", *argv)
        assert done.exit_code == 1
        return done.stderr

    assert "of another kind or user (USER ann)" in await refusal("--operator")
    assert "of another kind or user (USER ann)" in await refusal("--user", "bob")
    forged = key[:15] + other[15:]
    assert "stored with another secret" in await refusal("--user", "ann", api_key=forged)
    assert "none has an API key" in await refusal("--operator", api_key="obx_no")
    await shell.run("keys", "revoke", key)
    assert "was revoked, which is final" in await refusal("--user", "ann")
