"""Gap and window, checked on the SMTP side, and their cost for senders that they do not limit.

Time is compressed: an "hour" takes a second or two, and gaps take some ms.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import pytest

from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.services.dispatcher import dispatcher as dispatcher_module
from outbox_server.shared.states import JobState, SenderState
from tests.dispatchers import options, process, running, settings_of
from tests.eventually import eventually
from tests.smtp_servers import Say, ScriptedServer
from tests.world import World, gap_of, jobs_in, mails_of, most_of

Configure = Callable[..., dict[str, str]]
WINDOW = timedelta(seconds=1)


@pytest.fixture
def configure(database_url: str, redis_url: str, inbox: Inbox) -> Configure:
    def build(smtp_url: str = inbox.url, **changes: str | int) -> dict[str, str]:
        return options(database_url, redis_url, smtp_url, **changes)

    return build


@pytest.fixture
def _no_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable polling: the dispatcher acts only on computed times and on wake-ups."""
    monkeypatch.setattr(dispatcher_module, "HEARTBEAT", timedelta(hours=1))


@asynccontextmanager
async def working(values: dict[str, str]) -> AsyncIterator[World]:
    settings = settings_of(values)
    async with World(settings) as world, running(settings):
        yield world


# Limits of every sender ---------------------------------------------------------------------


@pytest.mark.parametrize("dispatchers", [1, 3])
async def test_no_gap_is_too_short_and_no_window_exceeds_its_limit(
    configure: Configure, inbox: Inbox, tmp_path: Path, dispatchers: int
) -> None:
    values = configure(min_gap="80ms", rate_window="1s")
    async with World(settings_of(values)) as world, AsyncExitStack() as stack:
        if dispatchers == 1:
            await stack.enter_async_context(running(settings_of(values)))
        else:
            children = [
                await stack.enter_async_context(process(values, tmp_path / f"log{n}"))
                for n in range(dispatchers)
            ]
            for child in children:
                await eventually(child.serving)
        # Limit, gap and number of mails: bound by the window, by the gap, or by both.
        plans = {
            await world.sender(limit=3): (3, 0.08, 9),
            await world.sender(limit=5): (5, 0.08, 14),
            await world.sender(limit=10): (10, 0.08, 22),
            await world.sender(limit=4, gap_ms=200): (4, 0.2, 9),
            await world.sender(limit=100): (100, 0.08, 25),
            await world.sender(limit=1): (1, 0.08, 3),
        }
        jobs = [
            job for sender, (_, _, n) in plans.items() for job in await world.schedule(sender, n)
        ]
        await eventually(world.done)

        assert await world.states() == {JobState.SENT: len(jobs)}
        assert jobs_in(inbox.mails) == dict.fromkeys(jobs, 1)
        for sender, (limit, gap, n) in plans.items():
            assert gap_of(inbox.mails, sender) >= gap
            assert most_of(inbox.mails, sender, WINDOW) <= limit
            # In the order of their positions.
            mails = mails_of(inbox.mails, sender)
            assert len(mails) == n
            assert list(jobs_in(mails)) == sorted(jobs_in(mails))
        await world.check_counts()


@pytest.mark.parametrize("dispatchers", [1, 3])
async def test_without_a_gap_the_window_holds_for_mails_sent_concurrently(
    configure: Configure, inbox: Inbox, dispatchers: int
) -> None:
    values = configure(rate_window="1s", dispatcher_concurrency=10)
    async with World(settings_of(values)) as world, AsyncExitStack() as stack:
        for _ in range(dispatchers):
            await stack.enter_async_context(running(settings_of(values)))
        limits = {await world.sender(limit=n, max_in_flight=8): n for n in (3, 6, 10)}
        jobs = [job for each, n in limits.items() for job in await world.schedule(each, 3 * n)]
        await eventually(world.done)

        assert jobs_in(inbox.mails) == dict.fromkeys(jobs, 1)
        for sender, limit in limits.items():
            # Never more than the limit, and no entry stayed unused.
            assert most_of(inbox.mails, sender, WINDOW) == limit


@pytest.mark.usefixtures("_no_heartbeat")
async def test_a_refused_mail_keeps_its_gap_and_takes_no_entry(configure: Configure) -> None:
    plan = {"rcpt": [Say("550 5.1.1 nobody")], "data": [Say("451 4.7.1 greylisted")]}
    async with ScriptedServer(plan) as server:
        values = configure(smtp_url=server.url, min_gap="100ms", defer_backoff="1ms")
        async with working(values) as world:
            # Neither of the two refusals takes one of the two entries.
            _, *good = await world.schedule(await world.sender(limit=2), 3)
            await eventually(world.done)

        assert jobs_in(server.taken) == dict.fromkeys(good, 1)
        assert len(server.began) == 4
        assert min(b - a for a, b in pairwise(server.began)) >= 0.1


# The cost of blocked mail --------------------------------------------------------------------


@pytest.mark.usefixtures("_no_heartbeat")
@pytest.mark.parametrize("state", [SenderState.ACTIVE, SenderState.PAUSED])
async def test_a_blocked_sender_delays_nobody_and_causes_no_work(
    configure: Configure, inbox: Inbox, state: SenderState
) -> None:
    async with working(configure()) as world:
        # It is at its limit after one mail, or paused; its 3,000 other mails are older than all
        # others.
        blocked = await world.sender(limit=1, state=state)
        await world.schedule(blocked, 3_000, due=-timedelta(minutes=5))
        first = 1 if state is SenderState.ACTIVE else 0
        await eventually(lambda: len(inbox.mails) == first)
        others = [await world.sender() for _ in range(20)]
        await world.redis.config_resetstat()
        for sender in others:
            await world.schedule(sender, 5)
        await eventually(lambda: world.done(*others))

        steps = (await world.redis.info("commandstats"))["cmdstat_evalsha"]["calls"]
        # Ten Lua calls per mail would be plenty; a look per blocked job would be 3,000 and more.
        assert steps < 1_000
        assert len(mails_of(inbox.mails, blocked)) == first
        waiting = [
            mail.started_at
            - (await world.job(next(iter(jobs_in([mail]))))).scheduled_at.timestamp()
            for sender in others
            for mail in mails_of(inbox.mails, sender)
        ]
        assert len(waiting) == 100
        assert max(waiting) < 10


# Changes of settings -------------------------------------------------------------------------


@pytest.mark.usefixtures("_no_heartbeat")
async def test_a_pause_holds_from_the_next_claim_on_and_a_resume_continues_where_it_stopped(
    configure: Configure, inbox: Inbox
) -> None:
    async with working(configure(min_gap="60ms")) as world:
        sender, control = await world.sender(), await world.sender()
        # A busy machine has a second to pause the sender.
        jobs = await world.schedule(sender, 20)
        await eventually(lambda: len(mails_of(inbox.mails, sender)) >= 3)
        await world.change(sender, state=SenderState.PAUSED)
        allowed = await world.in_state(JobState.SENDING, JobState.SENT)
        # For as long as the paused sender would have needed for its other mails.
        await world.schedule(control, 20)
        await eventually(lambda: world.done(control))

        sent = set(jobs_in(mails_of(inbox.mails, sender)))
        assert sent == allowed & set(jobs)
        assert 3 <= len(sent) < len(jobs)
        waiting = sorted(set(jobs) - sent)
        assert waiting == jobs[len(sent) :]
        await world.change(sender, state=SenderState.ACTIVE)
        await eventually(world.done)

        mails = mails_of(inbox.mails, sender)
        assert list(jobs_in(mails)) == jobs
        assert set(jobs_in(mails).values()) == {1}
        assert gap_of(inbox.mails, sender) >= 0.06


@pytest.mark.usefixtures("_no_heartbeat")
async def test_a_changed_limit_holds_from_the_next_claim_on(
    configure: Configure, inbox: Inbox
) -> None:
    async with working(configure()) as world:
        sender, control = await world.sender(limit=2), await world.sender()
        await world.schedule(sender, 10)
        await eventually(lambda: len(inbox.mails) == 2)

        await world.change(sender, hourly_limit=5)
        await eventually(lambda: len(inbox.mails) == 5)

        await world.change(sender, hourly_limit=3)
        await world.schedule(control, 10)
        await eventually(lambda: world.done(control))
        assert len(mails_of(inbox.mails, sender)) == 5

        await world.change(sender, hourly_limit=100)
        await eventually(world.done)
        assert len(mails_of(inbox.mails, sender)) == 10


@pytest.mark.usefixtures("_no_heartbeat")
async def test_a_changed_gap_holds_from_the_next_claim_on(
    configure: Configure, inbox: Inbox
) -> None:
    async with working(configure(min_gap="20ms")) as world:
        sender = await world.sender(gap_ms=600_000)
        jobs = await world.schedule(sender, 8)
        await eventually(lambda: len(inbox.mails) == 1)

        # The gap is below the operator's floor, so the floor applies.
        await world.change(sender, min_gap_ms=1)
        await eventually(lambda: len(inbox.mails) >= 4)
        await world.change(sender, min_gap_ms=150)
        sure = len(inbox.mails) + len(await world.in_state(JobState.SENDING))
        await eventually(world.done)

        assert list(jobs_in(inbox.mails)) == jobs
        assert gap_of(inbox.mails, sender) >= 0.02
        assert gap_of(inbox.mails[sure:], sender) >= 0.15


@pytest.mark.usefixtures("_no_heartbeat")
async def test_a_deleted_sender_sends_no_further_mail(configure: Configure, inbox: Inbox) -> None:
    async with working(configure(min_gap="30ms")) as world:
        sender, control = await world.sender(), await world.sender()
        await world.schedule(sender, 20)
        await eventually(lambda: len(inbox.mails) >= 2)
        await world.sql("UPDATE senders SET deleted_at = now() WHERE id = %s", sender)
        await world.loader.load([sender], committed=True)
        allowed = await world.in_state(JobState.SENDING, JobState.SENT)
        await world.schedule(control, 10)
        await eventually(lambda: world.done(control))

        assert set(jobs_in(mails_of(inbox.mails, sender))) == allowed
