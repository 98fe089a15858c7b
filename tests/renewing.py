"""Sends without SMTP, for tests of leases: each has a renewed lease and waits for a reply.

`python -m tests.renewing` sends one claimed job in a separate process that tests can stop.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import structlog
from prometheus_client import CollectorRegistry
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.services.dispatcher.cooling import CooldownRules
from outbox_server.services.dispatcher.metrics import DispatcherMetrics
from outbox_server.services.dispatcher.outcomes import OutcomeRules
from outbox_server.services.dispatcher.renewer import LeasedJob, Renewer
from outbox_server.services.dispatcher.settler import Settler
from outbox_server.services.dispatcher.slots import Slots
from outbox_server.services.dispatcher.smtp import SendResult
from outbox_server.services.dispatcher.storage import MarkedJob
from outbox_server.shared.database.engine import create_engine
from outbox_server.shared.heads.loader import HeadLoader
from outbox_server.shared.queue.connection import connect, open_queues
from outbox_server.shared.queue.records import Claim
from outbox_server.shared.settings import Settings, load_settings
from outbox_server.shared.states import AttemptOutcome, ReplyClass
from tests.marked_jobs import mark_refs

# Longer than any lease of these tests.
REPLY_LIMIT_S = 600.0


@dataclass
class LeasedSend:
    """One send: it waits for `reply` while its lease lasts."""

    claim: Claim
    marked: MarkedJob
    claimed: float
    # Whether its body had begun before the wait.
    in_body: bool = True
    reply: asyncio.Event = field(default_factory=asyncio.Event)
    leased: LeasedJob | None = None
    # The `time.monotonic` of its end, and whether a reply ended it.
    ended: float = 0.0
    replied: bool = False

    @property
    def job(self) -> int:
        return self.marked.job.job_id


class SendingWithoutSmtp:
    """A dispatcher without SMTP: it claims, renews and settles."""

    def __init__(self, settings: Settings, statements: AsyncEngine, loader: HeadLoader) -> None:
        self.settings = settings
        self.statements = statements
        self.loader = loader
        self.registry = CollectorRegistry()
        metrics = DispatcherMetrics(self.registry)
        self.renewer = Renewer(statements, loader, settings.lease, metrics)
        self._outcomes = OutcomeRules(settings)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.renewer.run())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def begin(self, want: int = 1, *, in_body: bool = True) -> list[LeasedSend]:
        """Claim and mark up to that many jobs of each shard; `send` sends them."""
        sends: list[LeasedSend] = []
        for queue in self.loader.queues:
            asked = time.monotonic()
            claims = (await queue.claim(want)).claims
            async with self.statements.connect() as connection:
                marked = await mark_refs(
                    connection, [claim.job for claim in claims], self.settings.lease
                )
            by_job = {each.job: each for each in marked}
            sends += [LeasedSend(claim, by_job[claim.job], asked, in_body) for claim in claims]
        return sends

    async def send(self, send: LeasedSend) -> None:
        """Wait for the reply, for as long as the lease lasts."""
        leased = send.leased = self.renewer.begin(send.claim, send.marked, send.claimed)
        leased.lease.begun = True
        try:
            async with leased.lease.limit(REPLY_LIMIT_S):
                await send.reply.wait()
            send.replied = True
        except TimeoutError:
            pass
        finally:
            self.renewer.end(leased)
        send.ended = time.monotonic()

    async def settle(self, *sends: LeasedSend) -> None:
        """Record the outcomes of these sends: SENT, in doubt, or given back."""
        transactions = create_engine(self.settings, lookups_only=True)
        settler = Settler(
            self.statements,
            transactions,
            self.loader,
            Slots(len(sends), unproven=2),
            CooldownRules.from_settings(self.settings),
        )
        for send in sends:
            settler.settle(self._outcome(send))
        settler.close()
        try:
            await settler.run()
        finally:
            await transactions.dispose()

    def _outcome(self, send: LeasedSend) -> Any:
        assert send.leased is not None
        if not send.replied and not send.in_body:
            return self._outcomes.given_back(send.leased, send.claimed)
        outcome = AttemptOutcome.SENT if send.replied else AttemptOutcome.IN_DOUBT
        result = SendResult(
            outcome,
            body_begun=True,
            started=send.claimed,
            ended=send.ended,
            smtp_code=250 if send.replied else None,
            reply_class=ReplyClass.SENT if send.replied else None,
        )
        return self._outcomes.ended(
            send.leased.claim,
            send.leased.marked,
            result,
            late=send.claim.waited,
            server="x.test:25",
        )


async def _main(values: dict[str, str]) -> None:
    """Send one job and print its outcome. A line on stdin is the reply."""
    settings = load_settings(**values)
    statements = create_engine(settings, lookups_only=True, single_statements=True)
    redis = connect(settings)
    loader = HeadLoader(statements, open_queues(redis, settings), settings)
    sending = SendingWithoutSmtp(settings, statements, loader)
    async with sending.running():
        [send] = await sending.begin()
        waiting = asyncio.create_task(sending.send(send))
        print("begun", flush=True)  # noqa: T201 - what the test reads
        await waiting
        await sending.settle(send)
        print("replied" if send.replied else "stopped", flush=True)  # noqa: T201
    await statements.dispose()
    await redis.aclose()


if __name__ == "__main__":
    # The test reads stdout line by line, so log lines must not appear there.
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    asyncio.run(_main(json.loads(sys.argv[1])))
