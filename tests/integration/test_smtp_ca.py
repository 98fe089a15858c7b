"""Mail servers with certificates signed by a private CA."""

from __future__ import annotations

from pathlib import Path

import pytest

from outbox_server.deploy.certificates import self_signed, server_context
from outbox_server.services.dispatcher.smtp import SmtpPool
from outbox_server.shared.bounds import MAX_CA_BYTES, MAX_CA_CERTIFICATES
from outbox_server.shared.errors import ConfigurationError
from outbox_server.shared.settings import load_settings
from outbox_server.shared.states import AttemptOutcome, SmtpSecurity
from outbox_server.shared.tls import TlsContexts, check_ca
from tests.smtp_pools import endpoint_of, pool_of, send
from tests.smtp_servers import ScriptedServer

SENT = AttemptOutcome.SENT
CONNECTION = AttemptOutcome.CONNECTION_FAILURE


@pytest.fixture(params=[SmtpSecurity.STARTTLS, SmtpSecurity.TLS])
def security(request: pytest.FixtureRequest) -> SmtpSecurity:
    return SmtpSecurity(request.param)


async def test_the_operators_ca_is_trusted_for_every_endpoint(
    security: SmtpSecurity, tmp_path: Path
) -> None:
    async with serving(tmp_path, security) as server:
        settings = load_settings(smtp_ca=str(tmp_path / "127.0.0.1.crt"))
        pool = pool_of(timeout=5.0, tls=TlsContexts.from_settings(settings))
        result = await send(pool, endpoint_of(server, security=security))
        assert result.outcome is SENT, result.message
        await pool.close()


async def test_a_senders_ca_is_trusted_only_for_its_endpoint(
    security: SmtpSecurity, tmp_path: Path
) -> None:
    pool = pool_of(timeout=5.0)
    async with serving(tmp_path, security) as server:
        ca = (tmp_path / "127.0.0.1.crt").read_text()
        trusting = endpoint_of(server, security=security, ca=ca)
        for _ in range(2):
            result = await send(pool, trusting)
            assert result.outcome is SENT, result.message
        assert server.connections == 1

        # A sender without this CA does not trust it and gets no connection opened with it.
        await refused(pool, server, security, "")
        other = self_signed(tmp_path / "other").public.read_text()
        await refused(pool, server, security, other)
        await pool.close()


async def refused(pool: SmtpPool, server: ScriptedServer, security: SmtpSecurity, ca: str) -> None:
    result = await send(pool, endpoint_of(server, security=security, ca=ca))
    assert result.outcome is CONNECTION
    assert "certificate of 127.0.0.1 is not trusted" in (result.message or "")


def serving(folder: Path, security: SmtpSecurity) -> ScriptedServer:
    context = server_context(self_signed(folder))
    return ScriptedServer(tls=context, implicit_tls=security is SmtpSecurity.TLS)


async def test_an_unusable_ca_is_a_failure_of_the_endpoint(security: SmtpSecurity) -> None:
    pool = pool_of(timeout=5.0)
    async with ScriptedServer(extensions=["STARTTLS"]) as server:
        result = await send(pool, endpoint_of(server, security=security, ca="no certificate"))
        assert result.outcome is CONNECTION
        assert "CA certificates cannot be used" in (result.message or "")


async def test_a_context_is_built_once_for_each_text_of_certificates(tmp_path: Path) -> None:
    contexts = TlsContexts()
    ca = self_signed(tmp_path).public.read_text()
    first = await contexts.context_for(ca)
    assert await contexts.context_for(ca) is first
    assert await contexts.context_for("") is not first


@pytest.mark.parametrize("text", ["", "hello", "-----BEGIN CERTIFICATE-----\nAAAA\n"])
def test_a_text_without_a_certificate_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must contain a certificate in PEM"):
        check_ca(text)
    file = tmp_path / "ca.pem"
    file.write_text(text)
    with pytest.raises(ConfigurationError, match=r"OUTBOX_SMTP_CA: .*ca\.pem"):
        TlsContexts.from_settings(load_settings(smtp_ca=str(file)))


def test_the_size_of_certificates_is_limited(tmp_path: Path) -> None:
    text = self_signed(tmp_path).public.read_text()
    check_ca(text + "#" * (MAX_CA_BYTES - len(text)))
    with pytest.raises(ValueError, match="at most 65536 bytes"):
        check_ca(text + "#" * (MAX_CA_BYTES + 1 - len(text)))


@pytest.mark.parametrize("strange", ["\x00", "\x1b[2J", "\u00e4"])
def test_certificates_must_be_storable_text(strange: str, tmp_path: Path) -> None:
    text = self_signed(tmp_path).public.read_text()
    with pytest.raises(ValueError, match=r"must be PEM, in ASCII \(got a character U\+00"):
        check_ca(text + strange)


def test_a_private_key_among_certificates_is_refused(tmp_path: Path) -> None:
    pair = self_signed(tmp_path)
    with pytest.raises(ValueError, match="got a private key"):
        check_ca(pair.public.read_text() + pair.private.read_text())


def test_the_number_of_certificates_has_a_limit(tmp_path: Path) -> None:
    text = self_signed(tmp_path).public.read_text()
    check_ca(text * MAX_CA_CERTIFICATES)
    with pytest.raises(ValueError, match="at most 50 certificates"):
        check_ca(text * (MAX_CA_CERTIFICATES + 1))


def test_a_missing_file_prevents_the_start() -> None:
    with pytest.raises(ConfigurationError, match="OUTBOX_SMTP_CA: /no/such/file cannot be read"):
        TlsContexts.from_settings(load_settings(smtp_ca="/no/such/file"))
