"""VerifySender: its findings at endpoints that work and at endpoints that do not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from cryptography.fernet import Fernet
from outbox.v1 import sender_service_pb2 as pb
from outbox.v1.email_job_pb2 import REPLY_CLASS_ACCOUNT, REPLY_CLASS_UNSPECIFIED
from outbox.v1.sender_pb2 import (
    SMTP_SECURITY_NONE,
    SMTP_SECURITY_STARTTLS,
    SMTP_SECURITY_TLS,
    SmtpEndpoint,
    SmtpSecurity,
)
from outbox.v1.sender_service_pb2 import VerifySenderRequest, VerifySenderResponse

from outbox_server.deploy.certificates import self_signed, server_context
from outbox_server.deploy.ports import free_port
from outbox_server.services.scheduler.verifying import AT_ONCE_PER_USER
from tests.eventually import eventually
from tests.scheduler_stack import Scheduler, refusal_of, running_scheduler
from tests.smtp_servers import Close, Conversation, Say, ScriptedServer, Succeed, Wait, plain_login


@pytest.fixture
def smtp_timeout() -> str:
    """The limit for each reply. It is short only for a server that sends none."""
    return "60s"


@pytest_asyncio.fixture
async def scheduler(
    database_url: str, redis_url: str, smtp_timeout: str
) -> AsyncIterator[Scheduler]:
    settings = {
        "smtp_allow": "127.0.0.0/8",
        "smtp_ports": "any",
        "smtp_timeout": smtp_timeout,
        "encryption_keys": Fernet.generate_key().decode(),
    }
    async with running_scheduler(database_url, redis_url, **settings) as running:
        yield running


async def verify(
    scheduler: Scheduler, port: int, *, recipient: str = "", **fields: Any
) -> VerifySenderResponse:
    sender_fields = {"email": fields.pop("email")} if "email" in fields else {}
    fields = {"host": "127.0.0.1", "port": port, "security": SMTP_SECURITY_NONE, **fields}
    sender = await scheduler.sender(smtp=SmtpEndpoint(**fields), **sender_fields)
    return await scheduler.senders.VerifySender(
        VerifySenderRequest(sender_id=sender.sender_id, recipient=recipient)
    )


async def test_an_endpoint_that_accepts_mail_is_ready(scheduler: Scheduler) -> None:
    async with ScriptedServer() as server:
        answer = await verify(scheduler, server.port)
        assert answer.ready, answer.failure
        assert (answer.host, answer.port, answer.tls_version) == ("127.0.0.1", server.port, "")
        assert "SMTPUTF8" in answer.extensions
        assert answer.elapsed.ToMilliseconds() < 5_000
        assert answer.failed_step == pb.SMTP_STEP_UNSPECIFIED
        assert answer.reply_class == REPLY_CLASS_UNSPECIFIED
        assert not answer.HasField("max_message_bytes")
        # No mail was sent.
        assert server.visits["data"] == 0
        await eventually(lambda: server.endings == ["QUIT"])
        verbs = [command.split()[0] for command in server.commands]
        assert verbs == ["EHLO", "MAIL", "RCPT", "RSET", "QUIT"]


@pytest.mark.parametrize("extensions", [("SIZE 35882577",), ("SIZE 35882577", "PIPELINING")])
async def test_the_answer_lists_the_extensions_offered_and_the_ehlo_name_sent(
    scheduler: Scheduler, extensions: tuple[str, ...]
) -> None:
    async with ScriptedServer(extensions=extensions) as server:
        answer = await verify(scheduler, server.port)
        assert answer.ready, answer.failure
        assert answer.max_message_bytes == 35_882_577
        assert [*answer.extensions] == sorted(name.split()[0] for name in extensions)
        assert server.commands[0] == f"EHLO {answer.helo_name}"
        assert "." in answer.helo_name
        await eventually(lambda: server.endings == ["QUIT"])


@pytest.mark.parametrize(
    ("recipient", "expected"),
    [
        ("", "a@x.example"),
        ("someone@y.example", "someone@y.example"),
        ("j\u00fcrgen@y.example", "j\u00fcrgen@y.example"),
        ("anna@m\u00fcnchen.example", "anna@xn--mnchen-3ya.example"),
    ],
)
async def test_a_given_recipient_is_verified(
    scheduler: Scheduler, recipient: str, expected: str
) -> None:
    async with ScriptedServer() as server:
        answer = await verify(scheduler, server.port, email="a@x.example", recipient=recipient)
        assert answer.ready, answer.failure
        mail = "MAIL FROM:<a@x.example>"
        if not expected.isascii():
            mail += " SMTPUTF8 BODY=8BITMIME"
        assert mail in server.commands
        assert f"RCPT TO:<{expected}>" in server.commands


async def test_an_invalid_recipient_is_refused(scheduler: Scheduler) -> None:
    sender = await scheduler.sender()
    call = scheduler.senders.VerifySender(
        VerifySenderRequest(sender_id=sender.sender_id, recipient="nobody")
    )
    assert (await refusal_of(call)).reason == "ADDRESS_INVALID"


async def test_a_server_that_requires_a_fully_qualified_name_gets_one_or_its_reply_is_shown(
    database_url: str, redis_url: str
) -> None:
    def wants_a_dot(heard: Conversation) -> Any:
        return Succeed() if "." in heard.helo else Say("504 5.5.2 need fully-qualified hostname")

    async with ScriptedServer({"rcpt": wants_a_dot}) as server:
        for helo, ready in (("", True), ("mail.x.example", True), ("mail", False)):
            settings = {"smtp_allow": "127.0.0.0/8", "smtp_ports": "any", "smtp_helo": helo}
            async with running_scheduler(database_url, redis_url, **settings) as scheduler:
                answer = await verify(scheduler, server.port)
                assert answer.ready == ready, answer.failure
                assert not helo or answer.helo_name == helo
        assert (answer.smtp_code, answer.failed_step) == (504, pb.SMTP_STEP_RCPT)
        assert answer.failure.endswith("504 5.5.2 need fully-qualified hostname")


async def test_a_refusal_has_its_class(scheduler: Scheduler) -> None:
    async with ScriptedServer({"mail": Say("550 5.4.5 daily limit exceeded")}) as server:
        answer = await verify(scheduler, server.port)
    assert (answer.reply_class, answer.failed_step) == (REPLY_CLASS_ACCOUNT, pb.SMTP_STEP_MAIL)


async def test_a_session_takes_no_longer_in_total_than_its_limit(
    database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This holds even if the limits of its phases are longer: here, minutes."""
    monkeypatch.setattr("outbox_server.services.scheduler.verifying._LIMIT", 0.5)
    settings = {"smtp_allow": "127.0.0.0/8", "smtp_ports": "any"}
    async with (
        running_scheduler(database_url, redis_url, **settings) as scheduler,
        ScriptedServer({"rcpt": Wait()}) as server,
    ):
        answer = await verify(scheduler, server.port)
        assert not answer.ready
        assert answer.failed_step == pb.SMTP_STEP_RCPT
        assert not answer.HasField("smtp_code")
        await eventually(lambda: not server.open)


async def test_a_private_ca_of_the_sender_is_trusted(scheduler: Scheduler, tmp_path: Path) -> None:
    certificate = self_signed(tmp_path)
    async with ScriptedServer(tls=server_context(certificate)) as server:
        security: dict[str, Any] = {"security": SMTP_SECURITY_STARTTLS}
        assert not (await verify(scheduler, server.port, **security)).ready
        ca = certificate.public.read_text()
        answer = await verify(scheduler, server.port, ca_certificates=ca, **security)
        assert answer.ready, answer.failure


@pytest.mark.parametrize(
    ("plan", "step", "code", "smtp_timeout"),
    [
        ({"greeting": Say("554 5.7.1 go away")}, "connecting", 554, "60s"),
        ({"greeting": Close()}, "connecting", None, "60s"),
        ({"greeting": Wait()}, "connecting", None, "300ms"),
        ({"ehlo": Say("421 4.3.2 closing")}, "greeting (EHLO)", 421, "60s"),
        ({"mail": Say("550 5.7.1 not from you")}, "naming the sender (MAIL)", 550, "60s"),
        ({"mail": Say("421 4.3.2 closing")}, "naming the sender (MAIL)", 421, "60s"),
        ({"rcpt": Say("504 5.5.2 not qualified")}, "naming a recipient (RCPT)", 504, "60s"),
    ],
)
async def test_a_failed_verification_names_its_step_and_is_not_a_grpc_error(
    scheduler: Scheduler, plan: dict[str, Any], step: str, code: int | None
) -> None:
    async with ScriptedServer(plan) as server:
        answer = await verify(scheduler, server.port)
    assert not answer.ready
    assert answer.failure.startswith(f"{step}: "), answer.failure
    assert (answer.smtp_code if answer.HasField("smtp_code") else None) == code


async def test_a_port_without_a_listener_is_not_ready(scheduler: Scheduler) -> None:
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
    account: dict[str, Any] = {"security": security, "username": "anna", "password": "s3cret-word"}
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
        assert server.visits["mail"] == 1
        await eventually(lambda: not server.open)


async def test_the_operators_network_cannot_be_reached(database_url: str, redis_url: str) -> None:
    async with (
        running_scheduler(database_url, redis_url, smtp_ports="any") as scheduler,
        ScriptedServer() as server,
    ):
        answer = await verify(scheduler, server.port)
        assert not answer.ready
        assert "OUTBOX_SMTP_ALLOW" in answer.failure
        assert server.connections == 0


async def test_a_port_that_is_not_for_mail_is_refused_when_a_sender_is_written(
    database_url: str, redis_url: str
) -> None:
    async with running_scheduler(database_url, redis_url) as scheduler:
        for port in (0, 25, 465, 587, 2525):
            await scheduler.sender(smtp=SmtpEndpoint(host="mail.example.com", port=port))
        call = scheduler.sender(smtp=SmtpEndpoint(host="mail.example.com", port=6379))
        refusal = await refusal_of(call)
        assert refusal.reason == "SMTP_ENDPOINT_INVALID"
        assert refusal.violations == {
            "sender.smtp.port": "must be 25, 465, 587 or 2525; the operator can add ports in "
            "OUTBOX_SMTP_PORTS (got 6379)"
        }


async def test_a_sender_of_another_user_is_not_verified(scheduler: Scheduler) -> None:
    sender = await scheduler.sender()
    call = scheduler.senders.VerifySender(
        VerifySenderRequest(sender_id=sender.sender_id, user_id="bob")
    )
    assert (await refusal_of(call)).reason == "SENDER_NOT_FOUND"


async def test_verifications_per_user_are_limited_and_delay_no_other_call(
    database_url: str, redis_url: str
) -> None:
    async with (
        running_scheduler(
            database_url, redis_url, smtp_allow="127.0.0.0/8", smtp_ports="any"
        ) as scheduler,
        ScriptedServer({"greeting": Wait()}) as silent,
        ScriptedServer() as good,
    ):
        of_eve = await scheduler.sender("eve", smtp=at(silent))
        of_ann = await scheduler.sender("ann", smtp=at(good))
        request = VerifySenderRequest(sender_id=of_eve.sender_id, user_id="eve")
        # More calls than the server runs at once.
        calls = [asyncio.ensure_future(scheduler.senders.VerifySender(request)) for _ in range(70)]
        await eventually(lambda: silent.waiting["greeting"] == AT_ONCE_PER_USER)
        await eventually(lambda: sum(call.done() for call in calls) == 70 - AT_ONCE_PER_USER)
        refusal = await refusal_of(next(call for call in calls if call.done()))
        assert (refusal.code, refusal.reason) == ("RESOURCE_EXHAUSTED", "TOO_MANY_CALLS")
        request = VerifySenderRequest(sender_id=of_ann.sender_id, user_id="ann")
        assert (await scheduler.senders.VerifySender(request)).ready
        assert silent.waiting["greeting"] == AT_ONCE_PER_USER
        silent.cut()
        await asyncio.gather(*calls, return_exceptions=True)


def at(server: ScriptedServer) -> SmtpEndpoint:
    return SmtpEndpoint(host="127.0.0.1", port=server.port, security=SMTP_SECURITY_NONE)
