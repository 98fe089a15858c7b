"""Two users name the same account of a mail server: neither stops nor reads the other."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from outbox.v1.batch_service_pb2 import ScheduleBatchRequest
from outbox.v1.email_job_service_pb2 import (
    WAIT_REASON_ENDPOINT_DOWN,
    WAIT_REASON_HOURLY_LIMIT,
    ExplainEmailJobRequest,
    ExplainEmailJobResponse,
)
from outbox.v1.sender_pb2 import SMTP_SECURITY_STARTTLS, Sender, SmtpEndpoint

from outbox_server.deploy.certificates import self_signed, server_context
from outbox_server.shared.secrets import generate_key
from tests.dispatchers import options, running, settings_of
from tests.eventually import eventually
from tests.scheduler_stack import options_for
from tests.smtp_servers import Say, ScriptedServer, Succeed, plain_login
from tests.two_users import Metadata, Rivals, rivals

USER, PASSWORD, REFUSAL = "news", "right", "535 5.7.8 you are not news"
LOGIN = f"AUTH PLAIN {plain_login(USER, PASSWORD)}"


@dataclass
class Stage:
    """A scheduler, a dispatcher, and a mail server that knows one account."""

    both: Rivals
    server: ScriptedServer

    async def sender(self, key: Metadata, number: int, password: str, **fields: Any) -> Sender:
        endpoint = SmtpEndpoint(
            host="127.0.0.1",
            port=self.server.port,
            security=SMTP_SECURITY_STARTTLS,
            username=USER,
            password=password,
        )
        name = "ann" if key == self.both.ann else "eve"
        return await self.both.sender(
            key, email=f"{name}{number}@example.com", smtp=endpoint, **fields
        )

    async def schedule(self, key: Metadata, sender: Sender, n: int) -> list[str]:
        """Schedule `n` mails, and return their jobs in the order in which they are sent."""
        before = set(self.jobs())
        rows = "email\n" + "".join(f"{number}@b.org\n" for number in range(n))
        request = ScheduleBatchRequest(options=options_for(sender), csv=rows.encode())
        await self.both.scheduler.batches.ScheduleBatch(request, metadata=key)
        return [job for job in self.jobs() if job not in before]

    def jobs(self) -> list[str]:
        return [
            str(job) for (job,) in self.both.scheduler.rows("SELECT id FROM email_jobs ORDER BY id")
        ]

    async def explain(self, key: Metadata, job: str) -> ExplainEmailJobResponse:
        answer: ExplainEmailJobResponse = await self.both.scheduler.jobs.ExplainEmailJob(
            ExplainEmailJobRequest(email_job_id=job), metadata=key
        )
        return answer

    def has_taken(self, name: str, count: int) -> bool:
        return self.taken_from(name) == count

    def taken_from(self, name: str) -> int:
        return sum(mail.mail_from.startswith(name) for mail in self.server.taken)


@asynccontextmanager
async def stage(database_url: str, redis_url: str, folder: Path) -> AsyncIterator[Stage]:
    certificate = self_signed(folder)
    common = {
        "encryption_keys": generate_key(),
        "smtp_ca": str(certificate.public),
        "smtp_allow": "127.0.0.1",
        "min_gap": "0",
    }
    async with AsyncExitStack() as stack:
        server = ScriptedServer(tls=server_context(certificate), extensions=["AUTH PLAIN"])
        server.plan["auth"] = lambda _: Succeed() if server.commands[-1] == LOGIN else Say(REFUSAL)
        await stack.enter_async_context(server)
        both = await stack.enter_async_context(rivals(database_url, redis_url, **common))
        relay = "smtp://127.0.0.1:1"
        # After the first probe, an open circuit waits for long.
        calm = common | {"retry_backoff": "100ms,1h"}
        dispatching = settings_of(options(database_url, redis_url, relay, **calm))
        await stack.enter_async_context(running(dispatching))
        yield Stage(both, server)


async def test_a_wrong_password_for_the_account_of_another_user_stops_only_the_own_mail(
    database_url: str, redis_url: str, tmp_path: Path
) -> None:
    async with stage(database_url, redis_url, tmp_path) as it:
        ann, eve = it.both.ann, it.both.eve
        rude = [await it.sender(eve, number, "wrong") for number in range(4)]
        stopped = [job for sender in rude for job in await it.schedule(eve, sender, 2)]

        async def why_down() -> str:
            """Return why a job of Eve's waits for the endpoint, or nothing if none does."""
            for job in stopped:
                found = await it.explain(eve, job)
                if found.wait_reason == WAIT_REASON_ENDPOINT_DOWN:
                    return found.explanation
            return ""

        assert "you are not news" in await eventually(why_down)
        attempts = "SELECT count(*) FROM attempts WHERE sender_id = ANY(%s)"
        hers = [int(sender.sender_id) for sender in rude]

        async def is_quiet() -> bool:
            """Return whether the next probe of Eve's endpoint is far away."""
            waits = [await it.explain(eve, job) for job in stopped]
            soon = datetime.now(UTC) + timedelta(minutes=10)
            return all(wait.wait_end_time.ToDatetime(UTC) > soon for wait in waits)

        await eventually(is_quiet)
        tried = it.both.scheduler.value(attempts, hers)

        good = await it.sender(ann, 0, PASSWORD, hourly_limit=9)
        jobs = await it.schedule(ann, good, 10)
        await eventually(lambda: it.taken_from("ann") == 9)
        explained = await it.explain(ann, jobs[-1])
        assert explained.wait_reason == WAIT_REASON_HOURLY_LIMIT
        assert "5.7.8" not in str(explained)
        assert "not news" not in str(explained)
        # That the server has accepted Ann's mail does not end the waits of Eve's.
        assert await is_quiet()
        assert it.both.scheduler.value(attempts, hers) == tried
        assert it.taken_from("eve") == 0


async def test_users_with_the_same_account_and_password_share_no_connection(
    database_url: str, redis_url: str, tmp_path: Path
) -> None:
    async with stage(database_url, redis_url, tmp_path) as it:
        for key, name in ((it.both.ann, "ann"), (it.both.eve, "eve"), (it.both.ann, "ann")):
            sent = it.taken_from(name)
            sender = await it.sender(key, len(it.server.taken), PASSWORD)
            await it.schedule(key, sender, 1)
            await eventually(partial(it.has_taken, name, sent + 1))
        # The second sender of ann uses the connection of the first.
        assert it.server.connections == 2
