"""The health port and its probes, with TLS on the server and with unreachable stores."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from typer.testing import CliRunner

from outbox_server.cli.main import app
from outbox_server.deploy.certificates import self_signed
from outbox_server.deploy.ports import free_port
from outbox_server.shared.errors import ConfigurationError
from outbox_server.shared.rpc.probes import CONNECTIONS, open_probes
from outbox_server.shared.rpc.server import GrpcServer
from outbox_server.shared.settings import load_settings
from tests.eventually import PATIENCE, eventually

_Status = health_pb2.HealthCheckResponse


async def probe(address: str, name: str, limit: float = PATIENCE) -> str:
    """Return the result of a kubelet's gRPC probe: a state, or the code of an error."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(address, options) as channel:
        try:
            answer = await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=name), timeout=limit
            )
        except grpc.aio.AioRpcError as error:
            return error.code().name
    return str(_Status.ServingStatus.Name(answer.status))


def listen() -> str:
    return f"127.0.0.1:{free_port()}"


@asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[GrpcServer]:
    loaded = load_settings(auth="off", **settings)
    async with open_probes(loaded) as probes:
        server = GrpcServer(loaded, "127.0.0.1:0", [], probes=probes)
        await server.start()
        yield server
        await server.drain_and_stop(timedelta(0))


async def test_probes_need_no_tls_and_no_client_certificate_where_the_service_does(
    tmp_path: Path,
) -> None:
    pair, address = self_signed(tmp_path), listen()
    files = {"tls_certificate": str(pair.public), "tls_key": str(pair.private)}
    async with serving(health_listen=address, tls_client_ca=str(pair.public), **files) as server:
        assert await probe(f"127.0.0.1:{server.port}", "") == "UNAVAILABLE"
        assert await probe(address, "liveness") == "SERVING"


async def test_readiness_follows_the_server_and_liveness_does_not() -> None:
    address = listen()
    async with serving(health_listen=address) as server:
        for ready in (False, True, False, True):
            server.set_serving(ready)
            state = "SERVING" if ready else "NOT_SERVING"
            assert await probe(address, "readiness") == await probe(address, "") == state
            assert await probe(address, "liveness") == "SERVING"
        server.begin_drain()
        assert await probe(address, "readiness") == "NOT_SERVING"
        assert await probe(address, "liveness") == "SERVING"


async def test_the_health_port_answers_nothing_but_probes() -> None:
    address = listen()
    async with serving(health_listen=address):
        assert await probe(address, "outbox.v1.SenderService") == "NOT_FOUND"
        assert await probe(address, "x" * 5000) == "RESOURCE_EXHAUSTED"
        async with grpc.aio.insecure_channel(address) as channel:
            watch: Any = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await watch.read()
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_the_command_queries_the_health_port_and_its_exit_code_gives_the_state() -> None:
    address = listen()

    async def ask(*words: str) -> tuple[int, str]:
        # In a thread: the server runs in this event loop.
        done = await asyncio.to_thread(
            CliRunner().invoke, app, ["health", *words], env={"OUTBOX_HEALTH_LISTEN": address}
        )
        return done.exit_code, done.output.strip()

    assert "does not answer the probe (UNAVAILABLE)" in (await ask())[1]
    async with serving(health_listen=address) as server:
        assert await ask() == (1, "NOT_SERVING\nits stores are not checked yet")
        server.set_serving(False, "redis: out of memory")
        assert await ask() == (1, "NOT_SERVING\nredis: out of memory")
        assert await ask("liveness") == (0, "SERVING")
        server.set_serving(True)
        assert await ask("readiness", "--server", address) == (0, "SERVING")


@pytest.mark.parametrize("address", ["9000", "127.0.0.1:x", "127.0.0.1:70000"])
async def test_a_malformed_health_address_is_named(address: str) -> None:
    with pytest.raises(ConfigurationError, match=f"OUTBOX_HEALTH_LISTEN: '{address}' is not"):
        async with open_probes(load_settings(health_listen=address)):
            pass


async def test_a_health_address_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ConfigurationError, match=f"OUTBOX_HEALTH_LISTEN: {address} cannot"):
            async with open_probes(load_settings(health_listen=address)):
                pass


@asynccontextmanager
async def process(service: str, address: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a service whose stores are unreachable."""
    environment = {
        "PATH": os.defpath,
        "OUTBOX_AUTH": "off",
        "OUTBOX_DATABASE_URL": f"postgresql://outbox@127.0.0.1:{free_port()}/outbox",
        "OUTBOX_REDIS_URL": f"redis://127.0.0.1:{free_port()}/0",
        "OUTBOX_HEALTH_LISTEN": address,
        f"OUTBOX_{service.upper()}_LISTEN": "127.0.0.1:0",
    }
    words = (sys.executable, "-m", f"outbox_server.services.{service}")
    child = await asyncio.create_subprocess_exec(
        *words, env=environment, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        async with asyncio.timeout(PATIENCE):
            yield child
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()


@pytest.mark.parametrize("service", ["scheduler", "dispatcher", "stats"])
async def test_a_process_without_its_stores_is_live_but_not_ready_and_ends_on_sigterm(
    service: str,
) -> None:
    address = listen()
    async with process(service, address) as child:

        async def alive() -> bool:
            return await probe(address, "liveness") == "SERVING"

        await eventually(alive)
        assert await probe(address, "readiness") == "NOT_SERVING"
        child.send_signal(signal.SIGTERM)
        assert await child.wait() == 0


async def test_a_process_that_hangs_does_not_answer_the_liveness_probe() -> None:
    address = listen()
    async with process("stats", address) as child:

        async def state() -> str:
            return await probe(address, "liveness", 0.5)

        async def alive() -> bool:
            return await state() == "SERVING"

        await eventually(alive)
        # The kernel still accepts connections, as for an event loop that hangs.
        child.send_signal(signal.SIGSTOP)
        assert await state() == "DEADLINE_EXCEEDED"
        child.send_signal(signal.SIGCONT)
        await eventually(alive)


async def test_silent_connections_are_bounded_and_soon_give_their_places_to_others() -> None:
    address = listen()
    host, port = address.split(":")
    async with serving(health_listen=address), AsyncExitStack() as open_:
        silent = []
        for number in range(CONNECTIONS + 20):
            # They come from many peers, because each may have a few only.
            peer = f"127.0.1.{1 + number // 5}"
            reader, writer = await asyncio.open_connection(host, int(port), local_addr=(peer, 0))
            open_.callback(writer.close)
            silent.append(asyncio.create_task(_until_closed(reader)))
        # Those beyond the limit are closed at once, and the others because they are idle.
        await eventually(lambda: sum(task.done() for task in silent) >= 20)
        assert await probe(address, "liveness") == "UNAVAILABLE"
        await eventually(lambda: all(task.done() for task in silent), 30)
        assert await probe(address, "liveness") == "SERVING"


async def _until_closed(reader: asyncio.StreamReader) -> None:
    with suppress(ConnectionResetError):
        await reader.read()
