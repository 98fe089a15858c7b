"""What services log about a mail: its ids, but no content."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from outbox.v1 import email_job_service_pb2

from tests import dispatchers
from tests.dispatchers import DispatcherProcess
from tests.eventually import eventually
from tests.scheduler_stack import Scheduler
from tests.smtp_servers import Say, ScriptedServer, TakenMail

NEEDLES = ("tobias.needle", "needle-subject", "needle-body", "from.needle", "needle-row")
TO = "tobias.needle@example.org"
QUOTES = f"<{TO}> from.needle@example.com needle-subject needle-body"
SENT = Say(f"250 2.0.0 taken {QUOTES}")
REFUSED = Say(f"550 5.1.1 <{TO}>: User unknown {QUOTES}")
DEFERRED = Say(f"450 4.7.1 Greylisted {QUOTES}")
QUOTA = Say(f"550 5.4.5 Daily user sending limit exceeded. {QUOTES}")
CLOSING = Say(f"421 4.3.2 Service not available, closing {QUOTES}")


@dataclass
class Logged:
    """A scheduler and a dispatcher, as processes that log everything."""

    scheduler: Scheduler
    smtp: ScriptedServer
    processes: list[DispatcherProcess]

    def text(self) -> str:
        return "".join(process.log() for process in self.processes)

    def lines(self, event: str) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in self.text().splitlines()]
        return [line for line in found if line["event"] == event]

    async def line(self, event: str) -> dict[str, Any]:
        return (await eventually(lambda: self.lines(event)))[0]

    async def mail(self, sender: Any, *, subject: str = "needle-subject", to: str = TO) -> Any:
        return await self.scheduler.schedule(
            sender,
            f"email,name\n{to},needle-row\n",
            subject=subject,
            body="needle-body for {{ name }}",
            request_id=f"for {to}",
        )

    async def sender(self, **fields: Any) -> Any:
        return await self.scheduler.sender(
            email="from.needle@example.com", hourly_limit=1000, **fields
        )

    async def ended(self, state: int) -> None:
        statement = "SELECT count(*) FROM email_jobs WHERE state = %s"
        await eventually(lambda: self.scheduler.value(statement, state))


@pytest.fixture
def logged(new_database: Callable[[], str], redis_url: str, tmp_path: Path) -> Callable[..., Any]:
    @asynccontextmanager
    async def run(**changes: str) -> AsyncIterator[Logged]:
        async with ScriptedServer() as smtp:
            values = dispatchers.options(
                new_database(),
                redis_url,
                smtp.url,
                log_level="debug",
                defer_backoff="10ms",
                cooldown="1h",
                **changes,
            )
            async with (
                dispatchers.process(values, tmp_path / "scheduler", "scheduler") as scheduler,
                dispatchers.process(values, tmp_path / "dispatcher") as dispatcher,
                grpc.aio.insecure_channel(await scheduler.address()) as channel,
            ):
                await channel.channel_ready()
                client = Scheduler(channel, dispatchers.settings_of(values), scheduler.listen)
                yield Logged(client, smtp, [scheduler, dispatcher])

    return run


async def test_no_address_subject_or_body_is_logged(logged: Callable[..., Any]) -> None:
    async with logged() as it:
        it.smtp.plan.update(body=[SENT], rcpt=[Say("250 ok"), DEFERRED, REFUSED])
        await it.mail(await it.sender())
        await it.ended(3)
        # The mail is deferred once, and then refused permanently.
        await it.mail(await it.sender(), to=f"second.{TO}")
        await it.ended(4)
        it.smtp.plan["mail"] = [QUOTA]
        await it.mail(await it.sender(), to=f"third.{TO}")
        cooled = await it.line("sender_cools_down")
        it.smtp.plan["greeting"] = CLOSING
        it.smtp.cut()
        for number in range(3):
            await it.mail(await it.sender(), to=f"n{number}.{TO}")
        opened = await it.line("circuit_opened")
        await it.scheduler.define(
            "ALTER TABLE email_jobs ADD CHECK (recipient NOT LIKE 'odd%') NOT VALID"
        )
        with pytest.raises(grpc.aio.AioRpcError):
            await it.mail(await it.sender(), to=f"odd.{TO}")
        failed = await it.line("unexpected error")

        # The lines exist and have their ids, but no content.
        assert (cooled["smtp_code"], cooled["enhanced_code"]) == (550, "5.4.5")
        assert cooled["job_id"]
        assert opened["smtp_code"] == 421
        assert "CheckViolation" in failed["exception"]
        assert failed["request_id"] == "for [address]"
        attempts = it.lines("attempt_ended")
        assert {line["outcome"] for line in attempts} >= {
            "SENT",
            "PERMANENT_FAILURE",
            "TEMPORARY_FAILURE",
            "CONNECTION_FAILURE",
        }
        assert all(line["job_id"] and line["batch_id"] for line in attempts)
        taken: list[TakenMail] = it.smtp.taken
        assert all(needle.encode() in taken[0].data for needle in NEEDLES)
        assert [needle for needle in NEEDLES if needle in it.text()] == []


async def test_addresses_and_replies_are_logged_when_the_operator_asks_for_them(
    logged: Callable[..., Any],
) -> None:
    async with logged(log_addresses="true") as it:
        it.smtp.plan["mail"] = [QUOTA]
        await it.mail(await it.sender())
        assert QUOTES in (await it.line("sender_cools_down"))["reply"]


async def test_a_call_has_the_ids_that_its_request_names(logged: Callable[..., Any]) -> None:
    async with logged() as it:
        answer = await it.scheduler.schedule(await it.sender(), request_id="order-7")
        calls = await eventually(
            lambda: [line for line in it.lines("call") if "ScheduleBatch" in line["method"]]
        )
        assert calls[0]["request_id"] == "order-7"
        assert calls[0]["batch_id"] == answer.batch.batch_id
        with pytest.raises(grpc.aio.AioRpcError):
            await _get(it, "x" * 100)
        with pytest.raises(grpc.aio.AioRpcError):
            await _get(it, "987654")
        calls = await eventually(
            lambda: [line for line in it.lines("call") if "GetEmailJob" in line["method"]][1:]
        )
        assert calls[0]["job_id"] == 987654
        assert "xxx" not in it.text()


async def _get(it: Logged, email_job_id: str) -> None:
    async with asyncio.timeout(60):
        await it.scheduler.jobs.GetEmailJob(
            email_job_service_pb2.GetEmailJobRequest(email_job_id=email_job_id)
        )
