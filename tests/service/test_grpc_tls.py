"""TLS of a real server, with a certificate made for the test."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc

from shared.errors import ConfigurationError
from shared.grpc_server import GrpcServer
from shared.settings import load_settings

Pair = tuple[str, str]


@pytest.fixture
def make_pair(tmp_path: Path) -> Callable[[str], Pair]:
    """Write a self-signed certificate of 127.0.0.1 and its key, and return their paths."""

    def make(name: str) -> Pair:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(hours=1))
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
                critical=False,
            )
            .sign(key, hashes.SHA256())
        )
        paths = tmp_path / f"{name}.crt", tmp_path / f"{name}.key"
        paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        paths[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return str(paths[0]), str(paths[1])

    return make


async def test_a_client_that_trusts_the_certificate_is_served_and_plain_text_is_not(
    make_pair: Callable[[str], Pair],
) -> None:
    certificate, key = make_pair("one")
    settings = load_settings(auth="off", tls_certificate=certificate, tls_key=key)
    server = GrpcServer(settings, "127.0.0.1:0", [])
    await server.start()
    address = f"127.0.0.1:{server.port}"
    trust = grpc.ssl_channel_credentials(await asyncio.to_thread(Path(certificate).read_bytes))
    async with grpc.aio.secure_channel(address, trust) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), timeout=10
        )
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
    async with grpc.aio.insecure_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=10
            )
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await server.drain_and_stop(timedelta(seconds=1))


def test_a_pair_that_does_not_match_stops_the_start(make_pair: Callable[[str], Pair]) -> None:
    refused(make_pair("one")[0], make_pair("two")[1], "OUTBOX_TLS_CERTIFICATE=.*OUTBOX_TLS_KEY=")


def test_half_a_pair_stops_the_start(make_pair: Callable[[str], Pair]) -> None:
    refused(make_pair("one")[0], "", "set both, or neither")
    refused("", make_pair("two")[1], "set both, or neither")


def test_a_file_that_is_missing_or_no_pem_stops_the_start(
    make_pair: Callable[[str], Pair], tmp_path: Path
) -> None:
    certificate, key = make_pair("one")
    refused(str(tmp_path / "missing"), key, "No such file")
    (tmp_path / "text").write_text("no PEM")
    refused(str(tmp_path / "text"), key, "no PEM")
    refused(certificate, str(tmp_path / "text"), "no PEM")


def refused(certificate: str, key: str, text: str) -> None:
    settings = load_settings(auth="off", tls_certificate=certificate, tls_key=key)
    with pytest.raises(ConfigurationError, match=text):
        GrpcServer(settings, "127.0.0.1:0", [])
