"""ForecastBatch compared with what a dispatcher then does, in seconds instead of hours.

Random senders and batches with spacing, later starts, other waiting mail, sending hours and expiry.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import mean, median_low
from typing import Any

import pytest
from outbox.v1 import batch_pb2, sender_pb2
from outbox.v1.sender_service_pb2 import UpdateSenderRequest

from outbox_server.cli.options import to_duration, to_timestamp
from outbox_server.deploy.embedded.inbox import Inbox
from tests import dispatchers
from tests.eventually import PATIENCE, eventually
from tests.scheduler_stack import Scheduler
from tests.service.test_forecast import ForecastStack, csv_of, start

GAP = timedelta(milliseconds=600)
WINDOW = timedelta(seconds=3)
# Mails of each sender that are sent before the forecasts.
LEARNT = 3
# Eight of ten senders have more mails than a window allows, and the last of them ends after 8 s.
SEED = 2868


@pytest.fixture
async def stack(database_url: str, redis_url: str, tmp_path: Path) -> AsyncIterator[ForecastStack]:
    """A scheduler, a stats service and a dispatcher."""
    async with AsyncExitStack() as exits:
        inbox = await exits.enter_async_context(Inbox(tmp_path / "inbox"))
        smtp_url = f"smtp://127.0.0.1:{inbox.port}"
        options = dispatchers.options(
            database_url, redis_url, smtp_url, min_gap="600ms", rate_window="3s"
        )
        stack = await start(exits, database_url, redis_url, min_gap=GAP, rate_window=WINDOW)
        await exits.enter_async_context(dispatchers.running(dispatchers.settings_of(options)))
        yield stack


@dataclass
class RandomBatches:
    """Random batches, and what is known of them."""

    scheduler: Scheduler
    chance: random.Random
    # When the first mail of any batch is due.
    begin: datetime
    batches: list[batch_pb2.Batch] = field(default_factory=list)
    # When the openings of senders are over.
    closes: dict[int, datetime] = field(default_factory=dict)

    async def schedule(self, sender: sender_pb2.Sender, **options: Any) -> None:
        csv = csv_of(self.chance.randrange(2, 6))
        options = {"schedule_time": to_timestamp(self.begin), **options}
        self.batches.append((await self.scheduler.schedule(sender, csv, **options)).batch)

    async def at_random(self, sender: sender_pb2.Sender) -> None:
        more: dict[str, Any] = {}
        if self.chance.random() < 0.5:
            spacing = timedelta(milliseconds=self.chance.randrange(50, 1_000))
            more["spacing"] = to_duration(spacing)
        if self.chance.random() < 0.5:
            delay = timedelta(milliseconds=self.chance.randrange(100, 2_000))
            more["schedule_time"] = to_timestamp(self.begin + delay)
        await self.schedule(sender, **more)

    async def expiring(self, sender: sender_pb2.Sender, expire_after: timedelta) -> None:
        for _ in range(2):
            await self.schedule(sender, expire_after=to_duration(expire_after))

    async def keep_hours(
        self, sender: sender_pb2.Sender, begins: timedelta, lasts: timedelta
    ) -> None:
        """Store hours to the millisecond, which no caller can."""
        opens = self.begin + begins
        minute = timedelta(minutes=1)
        begin = (opens - opens.replace(hour=0, minute=0, second=0, microsecond=0)) / minute
        end = begin + lasts / minute
        self.closes[int(sender.sender_id)] = opens + lasts
        self.scheduler.execute(
            "UPDATE senders SET sending_hours = %s, revision = revision + 1 WHERE id = %s",
            json.dumps([[], begin % 1_440, end % 1_440, "UTC"]),
            int(sender.sender_id),
        )
        # Any change by a call loads the sender into Redis.
        changed = sender_pb2.Sender(sender_id=sender.sender_id, display_name="With hours")
        await self.scheduler.senders.UpdateSender(UpdateSenderRequest(sender=changed))

    def is_over(self) -> bool:
        """Return whether all is sent or expired but what waits for another day."""
        left = self.scheduler.rows(
            "SELECT DISTINCT sender_id, state FROM email_jobs WHERE state < 3"
        )
        now = datetime.now(UTC)
        return all(state == 1 and now > self.closes.get(sender, now) for sender, state in left)

    def sends_of(self, batch: batch_pb2.Batch) -> tuple[int, datetime]:
        """Return how many were sent, and when the last one ended."""
        ((count, end),) = self.scheduler.rows(
            "SELECT count(*), max(a.ended_at) FROM attempts a"
            " JOIN email_jobs j ON j.id = a.email_job_id WHERE j.batch_id = %s",
            int(batch.batch_id),
        )
        return count, end

    def slip_of(self, batch: batch_pb2.Batch) -> float:
        """Return how much the sends of its sender differ from what the forecast expects, in s.

        Each send is expected to take what the first ones took. A busy machine is slower or faster.
        """
        rows = self.scheduler.rows(
            "SELECT extract(epoch FROM ended_at - started_at)::float8, late_ms / 1000.0::float8"
            " FROM attempts WHERE sender_id = %s ORDER BY started_at",
            int(batch.sender_id),
        )
        first, rest = rows[:LEARNT], rows[LEARNT:]
        takes = mean(took for took, _ in first) + median_low(late for _, late in first)
        return float(sum(abs(took + late - takes) for took, late in rest))


def sent(scheduler: Scheduler) -> int:
    return int(scheduler.value("SELECT count(*) FROM email_jobs WHERE state = 3"))


async def test_the_forecast_end_is_within_one_gap_of_the_real_one(stack: ForecastStack) -> None:
    chance = random.Random(SEED)
    senders = [await stack.scheduler.sender(hourly_limit=chance.randrange(2, 7)) for _ in range(14)]
    began = time.monotonic()
    for sender in senders:
        await stack.scheduler.schedule(sender, csv_of(LEARNT))
    took = timedelta(seconds=time.monotonic() - began)
    # So that something has been sent, and its cost is known.
    learnt = LEARNT * len(senders)
    await eventually(lambda: sent(stack.scheduler) == learnt)
    # The forecasts are made before anything is due. They and their batches are 50 calls more.
    load = RandomBatches(
        stack.scheduler, chance, datetime.now(UTC) + timedelta(seconds=1) + 4 * took
    )

    # The sends of these fall on a grid of gaps, and what ends falls between two of them. What is
    # left over when they close expires before they open again, a day later.
    for sender in senders[10:12]:
        await load.keep_hours(sender, 4 * GAP, chance.randrange(1, 4) * GAP + GAP / 2)
        await load.expiring(sender, timedelta(minutes=5))
    for sender in senders[12:]:
        await load.expiring(sender, chance.randrange(2, 5) * GAP + GAP / 2)
    for sender in senders[7:10]:
        await load.keep_hours(sender, chance.randrange(1, 5) * GAP, timedelta(hours=1))
        await load.at_random(sender)
    for _ in range(11):
        await load.at_random(chance.choice(senders[:10]))
    forecasts = [await stack.forecast(batch_id=batch.batch_id) for batch in load.batches]
    assert sent(stack.scheduler) == learnt

    assert any(found.ahead_count for found in forecasts)
    accepted = [batch.accepted_count for batch in load.batches]
    will_be_sent = [n - found.expiring_count for n, found in zip(accepted, forecasts, strict=True)]
    assert sum(some < all_ for some, all_ in zip(will_be_sent, accepted, strict=True)) >= 3
    until_begin = (load.begin - datetime.now(UTC)).total_seconds()
    await eventually(load.is_over, until_begin + PATIENCE)
    sends = [load.sends_of(batch) for batch in load.batches]
    slips = [load.slip_of(batch) for batch in load.batches]
    gap = GAP.total_seconds()
    # A gap earlier or later is one mail more or less before an end.
    assert all(
        abs(count - expected) <= (expected < whole) + round(slip / gap)
        for (count, _), expected, whole, slip in zip(
            sends, will_be_sent, accepted, slips, strict=True
        )
    )
    beyond = [
        abs((end - found.end_time.ToDatetime(UTC)).total_seconds()) - slip
        for (count, end), found, expected, slip in zip(
            sends, forecasts, will_be_sent, slips, strict=True
        )
        # The last of a batch may have expired.
        if found.HasField("end_time") and count == expected
    ]
    assert len(beyond) >= 3
    assert max(beyond) < gap
    # How late each began is recorded: what a send takes is learnt from it.
    late = "SELECT count(*) FROM attempts WHERE coalesce(late_ms, -1) NOT BETWEEN 0 AND 9999"
    assert load.scheduler.value(late) == 0
