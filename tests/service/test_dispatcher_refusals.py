"""Reactions of a dispatcher to refusals, checked by the counts of the mail server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from functools import partial
from itertools import pairwise
from typing import Any

import pytest

from outbox_server.shared.states import JobState, ReplyClass
from tests.dispatchers import options, running, settings_of
from tests.eventually import eventually
from tests.service.test_dispatcher_shares import by
from tests.smtp_servers import Conversation, Say, ScriptedServer, Succeed, Wait
from tests.world import World, gap_of, jobs_in

Configure = Callable[..., dict[str, str]]
QUOTA = Say("550 5.4.5 Daily user sending limit exceeded.")
GREYLISTED = Say("450 4.7.1 <r@y.test>: Recipient address rejected: Greylisted, try again later")
PROBE_WAIT = 0.5


@pytest.fixture
def configure(database_url: str, redis_url: str) -> Configure:
    def build(smtp_url: str, **changes: str | int) -> dict[str, str]:
        given = {
            "cooldown": f"{PROBE_WAIT}s",
            "defer_backoff": "300ms,600ms",
            "quota_day": "1s",
        } | changes
        return options(database_url, redis_url, smtp_url, **given)

    return build


@asynccontextmanager
async def working(values: dict[str, str], dispatchers: int = 1) -> AsyncIterator[World]:
    settings = settings_of(values)
    async with World(settings) as world, asyncio.TaskGroup() as group:
        ready = [asyncio.Event() for _ in range(dispatchers)]
        stop = asyncio.Event()

        async def run(event: asyncio.Event) -> None:
            async with running(settings):
                event.set()
                await stop.wait()

        for event in ready:
            group.create_task(run(event))
        for event in ready:
            await event.wait()
        try:
            yield world
        finally:
            stop.set()


async def classes(world: World) -> dict[ReplyClass | None, int]:
    rows = await world.sql("SELECT reply_class, count(*) AS n FROM attempts GROUP BY 1")
    return {None if row.reply_class is None else ReplyClass(row.reply_class): row.n for row in rows}


async def cooldown(world: World, sender: int) -> Any:
    rows = await world.sql("SELECT * FROM cooldowns WHERE sender_id = %s", sender)
    return rows[0] if rows else None


@pytest.mark.parametrize("phase", ["mail", "rcpt", "data", "body"])
async def test_a_limit_of_mails_per_connection_fails_no_mail_under_any_reply(
    configure: Configure, phase: str
) -> None:
    def refuse_the_second(reply: str, heard: Conversation) -> Any:
        return Say(reply) if heard.taken == 1 else Succeed()

    # A cooldown or a backoff step would make a mail wait for longer than the test lasts.
    values = {"cooldown": "10m", "retry_backoff": "10m", "defer_backoff": "10m"}
    async with AsyncExitStack() as stack:
        servers = [
            await stack.enter_async_context(ScriptedServer({phase: partial(refuse_the_second, no)}))
            for no in ("451 no", "452 no", "500 no", "550 no", "554 no")
        ]
        async with working(configure("smtp://127.0.0.1:1", **values)) as world:
            jobs = [
                await world.schedule(await world.sender(max_in_flight=2, **by(server)), 8)
                for server in servers
            ]
            await eventually(world.done)
            assert await world.states() == {JobState.SENT: sum(map(len, jobs))}
            rows = await world.sql("SELECT max(attempt) AS attempts FROM email_jobs")
            assert rows[0].attempts == 1
        for server, own in zip(servers, jobs, strict=True):
            answered = [mail for mail in server.taken if mail.answered]
            assert jobs_in(answered) == dict.fromkeys(own, 1)
            assert server.endings == ["QUIT"] * len(own)


@pytest.mark.parametrize(
    ("phase", "reply", "dispatchers"),
    [
        ("mail", QUOTA, 3),
        ("rcpt", Say("550 sender has exceeded the maximum of 100 messages per hour"), 1),
        (
            "body",
            Say("554 5.2.0 STOREDRV.Submission.Exception:SubmissionQuotaExceededException"),
            3,
        ),
        ("mail", Say("550 5.7.1 Service unavailable, sender blocked"), 1),
    ],
)
async def test_a_refused_account_fails_no_mail_and_is_probed_with_one_mail_at_a_time(
    configure: Configure, phase: str, reply: Say, dispatchers: int
) -> None:
    async with (
        ScriptedServer({phase: reply}) as server,
        working(configure(server.url), dispatchers) as world,
    ):
        sender = await world.sender()
        jobs = await world.schedule(sender, 40)
        await eventually(lambda: cooldown(world, sender))
        began = await cooldown(world, sender)
        assert began.message
        # Two more probes are refused.
        await eventually(lambda: _refused(world, sender, began.refusals + 2))
        states = await world.states()
        assert states[JobState.SCHEDULED] + states[JobState.SENDING] == len(jobs)
        # The first mails were in flight together; afterwards one probe at a time is sent.
        assert len(server.began) <= 5 * dispatchers + 4
        probes = server.began[5 * dispatchers :]
        assert all(b - a >= PROBE_WAIT * 0.9 for a, b in pairwise(probes))

        server.plan.clear()
        await eventually(world.done)

        assert await cooldown(world, sender) is None
        assert await world.states() == {JobState.SENT: len(jobs)}
        assert jobs_in(server.taken) == dict.fromkeys(jobs, 1) | (
            jobs_in(server.taken) if phase == "body" else {}
        )
        assert (await classes(world))[ReplyClass.ACCOUNT] >= 3
        rows = await world.sql("SELECT max(failures) AS most FROM email_jobs")
        assert rows[0].most == 0
        await world.check_counts()


async def _refused(world: World, sender: int, n: int) -> bool:
    row = await cooldown(world, sender)
    return row is not None and row.refusals >= n


async def test_a_cooldown_survives_the_loss_of_redis(configure: Configure) -> None:
    async with (
        ScriptedServer({"mail": [QUOTA]}) as server,
        working(configure(server.url, cooldown="3s", min_gap="10ms")) as world,
    ):
        sender = await world.sender()
        other = await world.sender()
        jobs = await world.schedule(sender, 5)
        await eventually(lambda: cooldown(world, sender))
        row = await cooldown(world, sender)
        await world.redis.flushall()
        # The second mail shows that the rebuild has ended.
        await world.schedule(other, 1)
        await eventually(lambda: world.done(other))
        await eventually(lambda: world.done(sender))

        ours = [mail for mail in server.taken if mail.mail_from == f"s{sender}@x.test"]
        assert len(ours) == len(jobs)
        assert min(mail.started_at for mail in ours) >= row.next_probe_at.timestamp()


async def test_a_daily_quota_is_not_probed_before_the_oldest_send_has_left_the_day(
    configure: Configure,
) -> None:
    plan = {"mail": [Succeed(), Succeed(), Succeed(), QUOTA]}
    async with ScriptedServer(plan) as server:
        values = configure(server.url, cooldown="100ms", quota_day="3s", min_gap="10ms")
        async with working(values) as world:
            sender = await world.sender()
            await world.schedule(sender, 5)
            await eventually(world.done)

            assert await world.states() == {JobState.SENT: 5}
            first = server.taken[0].received_at
            assert server.began[4] - first >= 3


async def test_a_deferred_mail_waits_alone_and_the_others_are_sent(configure: Configure) -> None:
    async with (
        ScriptedServer({"rcpt": [GREYLISTED]}) as server,
        working(configure(server.url, min_gap="10ms", defer_backoff="2s")) as world,
    ):
        sender = await world.sender()
        jobs = await world.schedule(sender, 6)
        await eventually(world.done)

        assert await world.states() == {JobState.SENT: 6}
        # The first mail arrives last.
        assert [*jobs_in(server.taken)] == [*jobs[1:], jobs[0]]
        row = await world.job(jobs[0])
        assert (row.failures, row.attempt) == (0, 2)
        first, second = await world.attempts(jobs[0])
        assert second.started_at - first.ended_at >= 2


async def test_a_mail_that_is_deferred_for_too_long_fails_with_the_last_reply(
    configure: Configure,
) -> None:
    async with (
        ScriptedServer({"rcpt": GREYLISTED}) as server,
        working(configure(server.url, defer_for="1s")) as world,
    ):
        sender = await world.sender()
        [job] = await world.schedule(sender, 1)
        await eventually(world.done)

        assert await world.states() == {JobState.FAILED: 1}
        attempts = await world.attempts(job)
        assert attempts[-1].ended_at - attempts[0].ended_at >= 1
        assert len(attempts) >= 3


async def test_a_reply_that_mail_comes_too_fast_slows_the_sender_and_fails_no_mail(
    configure: Configure,
) -> None:
    too_fast = Say("450 4.2.1 The user you are trying to contact is receiving mail at a rate that")
    async with (
        ScriptedServer({"mail": [Succeed(), *[too_fast] * 4]}) as server,
        working(configure(server.url)) as world,
    ):
        sender = await world.sender(max_in_flight=1)
        jobs = await world.schedule(sender, 8)
        await eventually(world.done)

        assert await world.states() == {JobState.SENT: len(jobs)}
        assert jobs_in(server.taken) == dict.fromkeys(jobs, 1)
        # 125, 250, 500 and 1,000 ms after the refusals.
        assert server.began[5] - server.began[4] >= 1
        assert (await classes(world))[ReplyClass.RATE] == 4


async def test_unknown_refusals_in_a_row_begin_a_cooldown(configure: Configure) -> None:
    async with ScriptedServer({"rcpt": Say("550 computer says no")}) as server:
        values = configure(server.url, refusals_in_a_row=4, min_gap="10ms")
        async with working(values) as world:
            sender = await world.sender()
            jobs = await world.schedule(sender, 10)
            await eventually(lambda: cooldown(world, sender))
            began = await cooldown(world, sender)
            await eventually(lambda: _refused(world, sender, began.refusals + 2))
            assert (await world.states())[JobState.FAILED] == 4
            server.plan.clear()
            await eventually(world.done)

            assert await world.states() == {JobState.FAILED: 4, JobState.SENT: len(jobs) - 4}


async def test_refusals_in_a_row_begin_no_cooldown_if_the_setting_is_0(
    configure: Configure,
) -> None:
    async with ScriptedServer({"rcpt": Say("550 computer says no")}) as server:
        values = configure(server.url, refusals_in_a_row=0, min_gap="10ms")
        async with working(values) as world:
            await world.schedule(await world.sender(), 15)
            await eventually(world.done)

            assert await world.states() == {JobState.FAILED: 15}


@pytest.mark.parametrize("gap", [0.0, 0.05])
async def test_a_reply_that_takes_longer_than_the_lease_makes_no_copy(
    configure: Configure, gap: float
) -> None:
    answer = asyncio.Event()
    async with ScriptedServer({"body": (Wait(answer), Succeed())}) as server:
        values = configure(server.url, lease="4s", smtp_timeout="60s", min_gap=f"{gap}s")
        async with working(values, 2) as world:
            sender = await world.sender()
            jobs = await world.schedule(sender, 3)
            await eventually(lambda: server.waiting["body"] == (1 if gap else 3))
            held = await world.sql("SELECT max(lease_until) AS at FROM email_jobs")
            await eventually(lambda: _leases_moved(world, held[0].at + timedelta(seconds=5)))
            answer.set()
            await eventually(world.done)

            assert await world.states() == {JobState.SENT: len(jobs)}
            assert jobs_in(server.taken) == dict.fromkeys(jobs, 1)
            assert all([len(await world.attempts(job)) == 1 for job in jobs])
            assert not gap or gap_of(server.taken, sender) >= gap


async def _leases_moved(world: World, beyond: Any) -> bool:
    rows = await world.sql("SELECT max(lease_until) AS at FROM email_jobs")
    return rows[0].at is not None and rows[0].at > beyond


async def test_a_flushall_during_a_slow_reply_makes_no_copy(configure: Configure) -> None:
    answer = asyncio.Event()
    async with ScriptedServer({"body": (Wait(answer), Succeed())}) as server:
        values = configure(server.url, lease="4s", smtp_timeout="60s", min_gap="50ms")
        async with working(values, 2) as world:
            sender = await world.sender()
            jobs = await world.schedule(sender, 3)
            await eventually(lambda: server.waiting["body"] == 1)
            began = time.time()
            await world.redis.flushall()
            held = await world.sql("SELECT max(lease_until) AS at FROM email_jobs")
            await eventually(lambda: _leases_moved(world, held[0].at + timedelta(seconds=5)))
            assert time.time() - began > 4
            assert server.visits["body"] == 1
            answer.set()
            await eventually(world.done)

            assert jobs_in(server.taken) == dict.fromkeys(jobs, 1)
            assert gap_of(server.taken, sender) >= 0.05
