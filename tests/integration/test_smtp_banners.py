"""Users read the SMTP replies of an endpoint, but no text of another service."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import pytest

from outbox_server.deploy.ports import free_port
from outbox_server.shared.egress import Egress
from outbox_server.shared.errors import ConfigurationError
from outbox_server.shared.oauth2.token_answers import Failure
from outbox_server.shared.oauth2.token_client import TokenClient, TokenRequest
from outbox_server.shared.smtp_ports import PermittedPorts
from outbox_server.shared.states import AttemptOutcome, SmtpSecurity
from outbox_server.shared.tls import TlsContexts
from tests.smtp_pools import endpoint_of, pool_of, relay_at, send
from tests.smtp_servers import ScriptedServer
from tests.stream_server import StreamServer

SECRET = "internal-7.4.2"


class OtherService(StreamServer):
    """Says a banner to whoever connects, and waits until they have left."""

    def __init__(self, banner: str) -> None:
        super().__init__(None)
        self._banner = banner

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(self._banner.encode())
        await reader.read()


@dataclass(frozen=True)
class Nobody:
    """A port where nobody listens."""

    port: int


BANNERS = [
    f"SSH-2.0-{SECRET}\r\n",
    f"HTTP/1.1 400 Bad Request\r\nServer: {SECRET}\r\n\r\n",
    f"-ERR wrong number of arguments {SECRET}\r\n",
    f"* OK IMAP4rev1 {SECRET}\r\n",
    f"+OK POP3 {SECRET}\r\n",
    f"354 {SECRET}\r\n",
    f"{SECRET} " * 2_000,
    f"220-{SECRET}\r\n{SECRET}\r\n",
]


@pytest.mark.parametrize("banner", BANNERS, ids=range(len(BANNERS)))
async def test_a_banner_of_another_service_is_not_shown(banner: str) -> None:
    async with OtherService(banner) as service:
        pool = pool_of(timeout=5.0)
        result = await send(pool, endpoint_of(service))
        assert result.outcome is AttemptOutcome.CONNECTION_FAILURE
        assert result.message
        assert SECRET not in result.message
        await pool.close()


async def test_a_failed_tls_handshake_does_not_show_the_servers_text() -> None:
    async with OtherService(BANNERS[0]) as service:
        pool = pool_of(timeout=5.0)
        result = await send(pool, endpoint_of(service, security=SmtpSecurity.TLS))
        assert result.outcome is AttemptOutcome.CONNECTION_FAILURE
        assert SECRET not in (result.message or "")
        await pool.close()


async def test_a_failed_token_request_does_not_show_the_servers_text() -> None:
    async with OtherService(f"{BANNERS[0]}\r\n") as service:
        client = TokenClient(Egress(["127.0.0.1"]), TlsContexts())
        url = f"http://127.0.0.1:{service.port}/token"
        found = await client.request(TokenRequest(url, "id", ""))
        assert isinstance(found, Failure)
        assert "127.0.0.1: it does not speak HTTP" in found.message


@pytest.mark.parametrize("changes", [{}, {"host": "localhost", "operators": True}])
async def test_a_failed_connection_shows_no_address_that_the_user_did_not_write(
    changes: dict[str, Any],
) -> None:
    pool, nobody = pool_of(timeout=5.0), Nobody(free_port())
    result = await send(pool, endpoint_of(nobody, **changes))
    if changes:
        assert result.message == "no connection to the operator's relay: Connection refused"
    else:
        assert (
            result.message == f"no connection to 127.0.0.1, port {nobody.port}: Connection refused"
        )
    await pool.close()


async def test_a_name_of_the_relay_that_does_not_exist_is_not_shown() -> None:
    pool = pool_of(timeout=5.0)
    relay = endpoint_of(Nobody(25), host="relay..internal", operators=True)
    message = (await send(pool, relay)).message or ""
    assert message.startswith("no connection to the operator's relay")
    assert "internal" not in message
    await pool.close()


async def test_a_port_that_is_not_for_mail_is_not_connected_to() -> None:
    async with OtherService("220 hello\r\n") as service:
        ports = PermittedPorts("25, 465,587,2525")
        pool = pool_of(timeout=5.0, egress=Egress(["127.0.0.1"], ports=ports))
        result = await send(pool, endpoint_of(service))
        assert result.outcome is AttemptOutcome.CONNECTION_FAILURE
        assert result.message == (
            "the port must be 25, 465, 587 or 2525; the operator can add ports in "
            f"OUTBOX_SMTP_PORTS (got {service.port})"
        )
        assert service.connections == 0
        await pool.close()


async def test_the_operators_relay_may_have_any_port() -> None:
    async with ScriptedServer() as server:
        pool = pool_of(timeout=5.0, egress=Egress(ports=PermittedPorts("25")))
        result = await send(pool, relay_at(server))
        assert result.outcome is AttemptOutcome.SENT
        await pool.close()


def test_ports_are_a_list_or_any() -> None:
    assert not PermittedPorts("any").refusal(1)
    assert not PermittedPorts(" 25 , 26").refusal(26)
    assert PermittedPorts("25").refusal(26).startswith("must be 25; the operator")


@pytest.mark.parametrize("text", ["", "0", "25,", "65536", "-1", "all", "٢٥", "1" * 5_000])
def test_a_malformed_list_of_ports_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"OUTBOX_SMTP_PORTS: .* is not a list of ports"):
        PermittedPorts(text)
