"""`outbox senders` against a scheduler: private CAs, and the output of verify."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest_asyncio

from outbox_server.deploy.certificates import self_signed, server_context
from tests.commands import outbox
from tests.scheduler_stack import Scheduler, running_scheduler
from tests.smtp_servers import Say, ScriptedServer


@pytest_asyncio.fixture
async def scheduler(database_url: str, redis_url: str) -> AsyncIterator[Scheduler]:
    settings = {"smtp_allow": "127.0.0.0/8", "smtp_ports": "any"}
    async with running_scheduler(database_url, redis_url, **settings) as running:
        yield running


async def senders(scheduler: Scheduler, *words: str) -> tuple[int, Any]:
    """Run a command; return its exit code and its JSON."""
    done = await outbox(scheduler, "senders", *words, "-o", "json")
    return done.exit_code, json.loads(done.stdout)


async def test_a_sender_with_a_private_ca_is_verified_up_to_the_recipient(
    scheduler: Scheduler, tmp_path: Path
) -> None:
    certificate = self_signed(tmp_path)
    context = server_context(certificate)
    async with ScriptedServer(tls=context, extensions=["SIZE 1000000"]) as server:
        where = ("--smtp-host", "127.0.0.1", "--smtp-port", str(server.port))
        names = ("--user", "ann", "--email", "a@x.example")
        ca = ("--smtp-ca", str(certificate.public))
        code, made = await senders(scheduler, "create", *names, *where, *ca)
        assert (code, made["smtp"]["ca_certificates"]) == (0, certificate.public.read_text())

        asked = ("verify", made["sender_id"], "--recipient", "b@y.example")
        code, found = await senders(scheduler, *asked)
        assert (code, found["ready"], found["max_message_bytes"]) == (0, True, "1000000")
        assert "RCPT TO:<b@y.example>" in server.commands

        server.plan["rcpt"] = Say("504 5.5.2 need fully-qualified hostname")
        code, found = await senders(scheduler, *asked)
        assert (code, found["smtp_code"], found["failed_step"]) == (1, 504, "SMTP_STEP_RCPT")

        code, changed = await senders(scheduler, "update", made["sender_id"], *where)
        assert (code, changed["smtp"].get("ca_certificates", "")) == (0, "")
