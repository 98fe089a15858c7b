"""VerifySender: what it finds at endpoints that work, and at those that do not."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from cryptography.fernet import Fernet
from outbox.v1.sender_pb2 import (
    SMTP_SECURITY_NONE,
    SMTP_SECURITY_STARTTLS,
    SMTP_SECURITY_TLS,
    SmtpEndpoint,
    SmtpSecurity,
)
from outbox.v1.sender_service_pb2 import VerifySenderRequest, VerifySenderResponse

from deploy.local.certificates import self_signed, server_context
from deploy.local.ports import free_port
from tests.eventually import eventually
from tests.scheduler_stack import Scheduler, refusal_of, running_scheduler
from tests.smtp_servers import Close, Say, ScriptedServer, Wait, plain_login


@pytest_asyncio.fixture
async def scheduler(database_url: str, redis_url: str) -> AsyncIterator[Scheduler]:
    settings = {
        "smtp_allow": "127.0.0.0/8",
        "smtp_timeout": "300ms",
        "encryption_keys": Fernet.generate_key().decode(),
    }
    async with running_scheduler(database_url, redis_url, **settings) as running:
        yield running


async def verify(scheduler: Scheduler, port: int, **fields: Any) -> VerifySenderResponse:
    fields = {"host": "127.0.0.1", "port": port, "security": SMTP_SECURITY_NONE, **fields}
    sender = await scheduler.sender(smtp=SmtpEndpoint(**fields))
    return await scheduler.senders.VerifySender(VerifySenderRequest(sender_id=sender.sender_id))


async def test_an_endpoint_that_takes_mail_is_ready(scheduler: Scheduler) -> None:
    async with ScriptedServer() as server:
        answer = await verify(scheduler, server.port)
        assert answer.ready, answer.failure
        assert (answer.host, answer.port, answer.tls_version) == ("127.0.0.1", server.port, "")
        assert "SMTPUTF8" in answer.extensions
        assert answer.elapsed.ToMilliseconds() < 5_000
        # It was greeted, and nothing was handed in.
        assert [command.split()[0] for command in server.commands] == ["EHLO", "NOOP", "QUIT"]


@pytest.mark.parametrize(
    ("plan", "step", "code"),
    [
        ({"greeting": Say("554 5.7.1 go away")}, "connecting", 554),
        ({"greeting": Close()}, "connecting", None),
        ({"greeting": Wait()}, "connecting", None),
        ({"ehlo": Say("421 4.3.2 closing")}, "greeting (EHLO)", 421),
        ({"noop": Say("421 4.3.2 closing")}, "asking for nothing (NOOP)", 421),
    ],
)
async def test_a_failure_names_its_step_and_is_no_error(
    scheduler: Scheduler, plan: dict[str, Any], step: str, code: int | None
) -> None:
    async with ScriptedServer(plan) as server:
        answer = await verify(scheduler, server.port)
    assert not answer.ready
    assert answer.failure.startswith(f"{step}: "), answer.failure
    assert (answer.smtp_code if answer.HasField("smtp_code") else None) == code


async def test_a_port_where_nobody_listens_is_not_ready(scheduler: Scheduler) -> None:
    answer = await verify(scheduler, free_port())
    assert not answer.ready
    assert answer.failure.startswith("connecting: ")


async def test_a_server_without_starttls_is_not_ready(scheduler: Scheduler) -> None:
    async with ScriptedServer() as server:
        answer = await verify(scheduler, server.port, security=SMTP_SECURITY_STARTTLS)
    assert not answer.ready
    assert answer.failure.startswith("encrypting (TLS): "), answer.failure


@pytest.mark.parametrize("security", [SMTP_SECURITY_STARTTLS, SMTP_SECURITY_TLS])
async def test_a_session_is_encrypted_and_logged_in(
    scheduler: Scheduler,
    security: SmtpSecurity.ValueType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    certificate = self_signed(tmp_path)
    context = server_context(certificate)
    account = {"security": security, "username": "anna", "password": "s3cret-word"}
    async with ScriptedServer(
        tls=context, implicit_tls=security is SMTP_SECURITY_TLS, extensions=("AUTH PLAIN",)
    ) as server:
        answer = await verify(scheduler, server.port, **account)
        assert not answer.ready
        assert "certificate" in answer.failure.lower()
        assert "None" not in answer.failure
        assert "AUTH" not in " ".join(server.commands)

        monkeypatch.setenv("SSL_CERT_FILE", str(certificate.public))
        answer = await verify(scheduler, server.port, **account)
        assert answer.ready, answer.failure
        assert answer.tls_version.startswith("TLSv1.")
        assert f"AUTH PLAIN {plain_login('anna', 's3cret-word')}" in server.commands

        server.plan["auth"] = Say("535 5.7.8 no s3cret-word of ours")
        answer = await verify(scheduler, server.port, **account)
        assert (answer.ready, answer.smtp_code) == (False, 535)
        assert answer.failure.startswith("signing in (AUTH): "), answer.failure
        assert "s3cret-word" not in answer.failure
        assert server.visits["mail"] == 0
        await eventually(lambda: not server.open)


async def test_the_operators_network_is_not_reached(database_url: str, redis_url: str) -> None:
    async with (
        running_scheduler(database_url, redis_url) as scheduler,
        ScriptedServer() as server,
    ):
        answer = await verify(scheduler, server.port)
        assert not answer.ready
        assert "OUTBOX_SMTP_ALLOW" in answer.failure
        assert server.connections == 0


async def test_a_sender_of_another_user_is_not_verified(scheduler: Scheduler) -> None:
    sender = await scheduler.sender()
    call = scheduler.senders.VerifySender(
        VerifySenderRequest(sender_id=sender.sender_id, user_id="bob")
    )
    assert (await refusal_of(call)).reason == "SENDER_NOT_FOUND"
