"""Connections to a server: silent ones, too many of them, and those of other peers."""

from __future__ import annotations

import asyncio
import resource
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from outbox_server.deploy.certificates import self_signed
from outbox_server.deploy.ports import free_port
from outbox_server.shared.rpc import connections
from outbox_server.shared.rpc.probes import open_probes
from outbox_server.shared.rpc.server import GrpcServer
from outbox_server.shared.settings import load_settings
from tests.eventually import PATIENCE, eventually
from tests.peers import HALF_A_HELLO, Flood, relayed
from tests.two_users import check_as_fast, p99

# What an HTTP/2 client sends first, with empty settings; and the beginning of a header frame whose
# end never comes.
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000")
SLOW_HEADERS = PREFACE + bytes.fromhex("00ffff010000000001") + b"\x00" * 10
STREAMING = [("grpc.use_local_subchannel_pool", 1)]


@asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[int]:
    server = GrpcServer(load_settings(auth="off", **settings), "127.0.0.1:0", [])
    await server.start()
    try:
        yield server.port
    finally:
        await server.drain_and_stop(timedelta(0))


async def check(address: str, credentials: grpc.ChannelCredentials | None = None) -> str:
    """Make a health check over a new connection; return `OK` or the code of the error."""
    channel = (
        grpc.aio.insecure_channel(address, STREAMING)
        if credentials is None
        else grpc.aio.secure_channel(address, credentials, STREAMING)
    )
    async with channel:
        try:
            # A client tries again if the server had no place for its connection.
            await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=PATIENCE, wait_for_ready=True
            )
        except grpc.aio.AioRpcError as error:
            return error.code().name
    return "OK"


@pytest.mark.parametrize(
    "first",
    [b"", PREFACE, SLOW_HEADERS, b"GET / HTTP/1.1\r\n"],
    ids=["silent", "preface", "slow headers", "http"],
)
async def test_a_flood_of_one_peer_leaves_places_for_others(first: bytes) -> None:
    async with serving(connections_per_peer=20, connections=400) as port:
        flood = Flood(port, "127.0.0.2", first)

        async def call() -> None:
            assert await check(f"127.0.0.1:{port}") == "OK"

        quiet = await p99(call, 10)
        with flood:
            # More than the server takes of all peers together.
            await flood.open(500)
            await eventually(lambda: flood.alive() <= 20)
            await check_as_fast(call, quiet, 10)
            # Further connections take no more places.
            await flood.open(100)
            await eventually(lambda: flood.alive() <= 20)
            assert await check(f"127.0.0.1:{port}") == "OK"


async def test_a_flood_of_unfinished_tls_handshakes_leaves_places_for_others(
    tmp_path: Path,
) -> None:
    pair = self_signed(tmp_path)
    files = {"tls_certificate": str(pair.public), "tls_key": str(pair.private)}
    trusted = grpc.ssl_channel_credentials(pair.public.read_bytes())
    async with serving(connections_per_peer=20, connections=400, **files) as port:
        with Flood(port, "127.0.0.2", HALF_A_HELLO) as flood:
            await flood.open(500)
            await eventually(lambda: flood.alive() <= 20)
            assert await check(f"127.0.0.1:{port}", trusted) == "OK"


async def test_older_connections_of_a_peer_survive_its_flood() -> None:
    async with serving(connections_per_peer=20, connections=400) as port:
        address = f"127.0.0.1:{port}"
        async with grpc.aio.insecure_channel(address, STREAMING) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            watch = stub.Watch(health_pb2.HealthCheckRequest())
            await watch.read()
            with Flood(port, first=PREFACE) as kept:
                await kept.open(19)
                # More files than the guard ignores, so it checks them.
                with Flood(port, "127.0.0.2") as other:
                    await other.open(30)
                    await eventually(lambda: other.alive() <= 20)
                with Flood(port) as flood:
                    await flood.open(200)
                    await eventually(lambda: flood.alive() == 0)
                    assert kept.alive() == 19
                    await stub.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE)
                    assert not watch.done()
            watch.cancel()


async def test_a_handshake_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HANDSHAKE_MS", 300)
    async with serving() as port:
        with Flood(port) as silent, Flood(port, first=PREFACE) as agreed:
            await agreed.open(1)
            await silent.open(10)
            await eventually(lambda: silent.alive() == 0)
            assert agreed.alive() == 1


async def test_a_connection_without_calls_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "IDLE_MS", 300)
    async with serving() as port:
        idle = Flood(port, first=PREFACE)
        with idle:
            await idle.open(10)
            # The server says so (GOAWAY), and closes when its ping gets no answer.
            await eventually(lambda: idle.alive() == 0)


async def test_a_peer_has_a_limited_number_of_watches_and_others_have_their_own() -> None:
    async with serving() as port, relayed(port, "127.0.0.2") as other:
        address = f"127.0.0.1:{port}"
        async with (
            grpc.aio.insecure_channel(address, STREAMING) as channel,
            grpc.aio.insecure_channel(other, STREAMING) as others,
        ):
            stub = health_pb2_grpc.HealthStub(channel)
            reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
            begun: list[Any] = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(60)]
            for watch in begun:
                await watch.read()
            begun += [reflection.ServerReflectionInfo() for _ in range(40)]
            for stream in begun[60:]:
                await stream.write(reflection_pb2.ServerReflectionRequest(list_services=""))
                await stream.read()
            for call in (
                stub.Watch(health_pb2.HealthCheckRequest()),
                reflection.ServerReflectionInfo(),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call.read()
                assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert caught.value.details() == (
                    "100 health watches and reflection calls of peer 127.0.0.1 are in progress, "
                    "which is the limit; end some of them"
                )
            # Health checks have places of their own.
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE)
            # A peer with another address has places.
            theirs = health_pb2_grpc.HealthStub(others).Watch(health_pb2.HealthCheckRequest())
            await theirs.read()
            theirs.cancel()
            # A place is free again once a call has ended.
            begun[0].cancel()

            async def accepted() -> bool:
                begun.append(stub.Watch(health_pb2.HealthCheckRequest()))
                try:
                    await begun[-1].read()
                except grpc.aio.AioRpcError:
                    return False
                return True

            await eventually(accepted)
            for call in begun:
                call.cancel()


async def test_one_peer_cannot_keep_a_kubelet_from_the_health_port() -> None:
    address = f"127.0.0.1:{free_port()}"
    async with open_probes(load_settings(health_listen=address)):
        with Flood(int(address.rpartition(":")[2]), "127.0.0.2", PREFACE) as flood:
            await flood.open(200)
            await eventually(lambda: flood.alive() <= 8)
            assert await check(address) == "OK"


def test_a_server_may_open_as_many_files_as_the_system_permits() -> None:
    program = (
        "from outbox_server.shared.rpc.connections import connection_options as of, "
        "raise_file_limit; print(raise_file_limit(), dict(of(4000))["
        "'grpc.max_allowed_incoming_connections'])"
    )

    def limits(soft: int, hard: int) -> list[int]:
        done = subprocess.run(
            [sys.executable, "-c", program],
            check=True,
            capture_output=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)),
        )
        return [int(word) for word in done.stdout.split()]

    assert limits(256, 8_192) == [8_192, 4_000]
    # Fewer connections than wanted, as files of the server's own must stay possible.
    assert limits(256, 1_024) == [1_024, 768]


async def test_the_guard_touches_no_connection_of_another_port() -> None:
    """Such as those of a dispatcher to its mail servers, or of a client in the same process."""
    silent: list[asyncio.StreamWriter] = []
    other = await asyncio.start_server(lambda _, writer: silent.append(writer), "127.0.0.1", 0)
    async with serving(connections_per_peer=20) as port:
        with Flood(other.sockets[0].getsockname()[1]) as kept, Flood(port) as flood:
            await kept.open(50)
            await flood.open(50)
            await eventually(lambda: flood.alive() <= 20)
            assert kept.alive() == 50
    other.close()
    for writer in silent:
        writer.close()
    await other.wait_closed()
