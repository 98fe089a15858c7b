"""TLS of a real server, with a certificate made for the test."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from typer.testing import CliRunner

from outbox_server.cli.main import app
from outbox_server.deploy.certificates import self_signed
from outbox_server.shared.database.engine import create_engine
from outbox_server.shared.errors import ConfigurationError
from outbox_server.shared.rpc.server import GrpcServer
from outbox_server.shared.settings import load_settings
from tests.eventually import PATIENCE

Pair = tuple[str, str]


@pytest.fixture
def make_pair(tmp_path: Path) -> Callable[[str], Pair]:
    """Write a self-signed certificate for 127.0.0.1 and its key; return their paths."""

    def make(name: str) -> Pair:
        public, private = self_signed(tmp_path / name)
        return str(public), str(private)

    return make


@asynccontextmanager
async def serving(**settings: str) -> AsyncIterator[str]:
    server = GrpcServer(load_settings(auth="off", **settings), "127.0.0.1:0", [])
    await server.start()
    try:
        yield f"127.0.0.1:{server.port}"
    finally:
        await server.drain_and_stop(timedelta(seconds=1))


def content(path: str) -> bytes:
    return Path(path).read_bytes()


async def answers(address: str, trust: str = "", own: Pair | None = None) -> bool:
    """Return whether health answers a client on a new connection."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    if trust:
        credentials = grpc.ssl_channel_credentials(
            content(trust), content(own[1]) if own else None, content(own[0]) if own else None
        )
        opened = grpc.aio.secure_channel(address, credentials, options)
    else:
        opened = grpc.aio.insecure_channel(address, options)
    async with opened as channel:
        try:
            await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=PATIENCE
            )
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.UNAVAILABLE  # noqa: PT017 - both ways are right
            return False
    return True


async def test_a_client_that_trusts_the_certificate_is_served_and_plaintext_is_refused(
    make_pair: Callable[[str], Pair],
) -> None:
    certificate, key = make_pair("one")
    async with serving(tls_certificate=certificate, tls_key=key) as address:
        assert await answers(address, trust=certificate)
        assert not await answers(address, trust=make_pair("two")[0])
        assert not await answers(address)


async def test_a_renewed_certificate_is_served_without_a_restart(
    make_pair: Callable[[str], Pair],
) -> None:
    certificate, key = make_pair("one")
    async with serving(tls_certificate=certificate, tls_key=key) as address:
        old = shutil.copyfile(certificate, f"{certificate}.old")
        renewed = make_pair("renewed")
        # Between the two writes the files do not match, so the old pair stays in use.
        shutil.copyfile(renewed[0], certificate)
        assert await answers(address, trust=old)
        assert not await answers(address, trust=certificate)
        shutil.copyfile(renewed[1], key)
        assert await answers(address, trust=certificate)
        assert not await answers(address, trust=old)


async def test_with_a_client_ca_only_its_clients_are_accepted(
    make_pair: Callable[[str], Pair],
) -> None:
    certificate, key = make_pair("server")
    client, stranger = make_pair("client"), make_pair("stranger")
    async with serving(
        tls_certificate=certificate, tls_key=key, tls_client_ca=client[0]
    ) as address:
        assert await answers(address, trust=certificate, own=client)
        assert not await answers(address, trust=certificate)
        assert not await answers(address, trust=certificate, own=stranger)


async def test_the_command_line_speaks_tls_with_its_own_certificate(
    make_pair: Callable[[str], Pair],
) -> None:
    certificate, key = make_pair("server")
    client = make_pair("client")
    async with serving(
        tls_certificate=certificate, tls_key=key, tls_client_ca=client[0]
    ) as address:

        def run(*options: str, **variables: str) -> str:
            others = {name: None for name in os.environ if name.startswith("OUTBOX_")}
            argv = [*options, "senders", "list", "--user", "ann", "--server", address]
            return CliRunner().invoke(app, argv, env={**others, **variables}).output

        trusted = ("--tls-ca", certificate)
        own = ("--tls-cert", client[0], "--tls-key", client[1])
        # This server has no services; an accepted client gets METHOD_NOT_FOUND.
        assert "METHOD_NOT_FOUND" in await asyncio.to_thread(run, *trusted, *own)
        variables = {
            "OUTBOX_TLS_CA": certificate,
            "OUTBOX_TLS_CLIENT_CERTIFICATE": client[0],
            "OUTBOX_TLS_CLIENT_KEY": client[1],
        }
        assert "METHOD_NOT_FOUND" in await asyncio.to_thread(lambda: run(**variables))
        assert "requires a client certificate" in await asyncio.to_thread(run, *trusted)
        assert "--tls-ca" in await asyncio.to_thread(run, *own)
        assert "--tls-key" in await asyncio.to_thread(run, *trusted, *own[:2])
        missing = "--tls-ca: nowhere.crt cannot be read"
        assert missing in await asyncio.to_thread(run, "--tls-ca", "nowhere.crt")


def test_a_certificate_and_key_that_do_not_match_prevent_the_start(
    make_pair: Callable[[str], Pair],
) -> None:
    refused(make_pair("one")[0], make_pair("two")[1], "OUTBOX_TLS_CERTIFICATE=.*OUTBOX_TLS_KEY=")


def test_a_certificate_without_its_key_prevents_the_start(make_pair: Callable[[str], Pair]) -> None:
    refused(make_pair("one")[0], "", "set both, or neither")
    refused("", make_pair("two")[1], "set both, or neither")


def test_a_file_that_is_missing_or_not_pem_prevents_the_start(
    make_pair: Callable[[str], Pair], tmp_path: Path
) -> None:
    certificate, key = make_pair("one")
    refused(str(tmp_path / "missing"), key, "No such file")
    (tmp_path / "text").write_text("no PEM")
    refused(str(tmp_path / "text"), key, "not a PEM")
    refused(certificate, str(tmp_path / "text"), "not a PEM")


def test_a_client_ca_must_be_valid_and_requires_tls(
    make_pair: Callable[[str], Pair], tmp_path: Path
) -> None:
    certificate, key = make_pair("one")
    with pytest.raises(ConfigurationError, match=r"OUTBOX_TLS_CLIENT_CA: .*require TLS"):
        GrpcServer(load_settings(auth="off", tls_client_ca=certificate), "127.0.0.1:0", [])
    missing = str(tmp_path / "missing")
    settings = load_settings(
        auth="off", tls_certificate=certificate, tls_key=key, tls_client_ca=missing
    )
    with pytest.raises(ConfigurationError, match=f"OUTBOX_TLS_CLIENT_CA={missing}"):
        GrpcServer(settings, "127.0.0.1:0", [])


async def test_a_server_with_a_certificate_may_listen_beyond_loopback(
    make_pair: Callable[[str], Pair],
) -> None:
    certificate, key = make_pair("one")
    engine = create_engine(load_settings())  # no query runs on it
    settings = load_settings(auth="keys", tls_certificate=certificate, tls_key=key)
    server = GrpcServer(settings, "0.0.0.0:0", [], engine=engine)
    await server.start()
    assert await answers(f"127.0.0.1:{server.port}", trust=certificate)
    await server.drain_and_stop(timedelta(seconds=1))
    await engine.dispose()


def refused(certificate: str, key: str, text: str) -> None:
    settings = load_settings(auth="off", tls_certificate=certificate, tls_key=key)
    with pytest.raises(ConfigurationError, match=text):
        GrpcServer(settings, "127.0.0.1:0", [])
