"""A dispatcher that dies exactly between two steps of a send, at each of them, under load."""

from __future__ import annotations

import signal
from contextlib import AsyncExitStack
from datetime import timedelta

import pytest

from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.shared.states import AttemptOutcome, JobState
from tests.dispatchers import options, running, settings_of
from tests.dying import POINTS, doomed
from tests.eventually import eventually
from tests.world import World, gap_of, jobs_in, most_of

CONCURRENCY, SENDERS, LIMIT = 5, 6, 2
GAP, WINDOW = timedelta(milliseconds=50), timedelta(milliseconds=300)
# The visit of the point at which it dies; by then other mails are at other steps.
VISIT = 3
# The server has accepted the mail, but PostgreSQL has no record of it.
IN_DOUBT = ("before_the_reply", "after_the_reply")


@pytest.fixture
def urls(database_url: str, redis_url: str) -> tuple[str, str]:
    return database_url, redis_url


# Each point with both policies, alone and beside others, and each policy with both numbers. All
# three together would add nothing: the policy is read when a lease has expired, by one statement,
# and that statement does not know how many dispatchers there are.
CASES = [
    (point, policy, dispatchers)
    for number, point in enumerate(POINTS)
    for policy, dispatchers in (
        ("resend", 4 if number % 2 else 1),
        ("hold", 1 if number % 2 else 4),
    )
]


@pytest.mark.parametrize(("point", "policy", "dispatchers"), CASES)
async def test_a_kill_between_two_steps_loses_nothing_and_duplicates_only_mail_in_doubt(
    urls: tuple[str, str], inbox: Inbox, point: str, policy: str, dispatchers: int
) -> None:
    values = options(
        *urls,
        inbox.url,
        uncertain_policy=policy,
        dispatcher_concurrency=CONCURRENCY,
        rate_window="300ms",
        min_gap="50ms",
    )
    async with World(settings_of(values)) as world, AsyncExitStack() as stack:
        senders = [await world.sender(limit=LIMIT) for _ in range(SENDERS)]
        jobs = {job for each in senders for job in await world.schedule(each, LIMIT + 1)}
        dying = await stack.enter_async_context(doomed(values | {"lease": "1s"}, point, VISIT))
        for _ in range(dispatchers - 1):
            await stack.enter_async_context(running(settings_of(values)))

        async def died() -> bool:
            # The dispatcher that is to die needs work, although others send too.
            if len(inbox.mails) > len(jobs) - SENDERS:
                for sender in senders:
                    jobs.update(await world.schedule(sender))
            return not dying.is_alive()

        await eventually(died)
        assert dying.exitcode == -signal.SIGKILL
        assert len(await left_behind(world)) <= CONCURRENCY
        await stack.enter_async_context(running(settings_of(values)))
        await eventually(world.done)

        arrived = jobs_in(inbox.mails)
        copies = {job for job, n in arrived.items() if n > 1}
        sent = await world.in_state(JobState.SENT)
        in_doubt = await without_outcome(world)
        if policy == "hold":
            assert copies == set()
            assert in_doubt == await world.in_state(JobState.UNCERTAIN) == jobs - sent
            assert sent <= set(arrived) <= jobs
            assert point not in IN_DOUBT or in_doubt & set(arrived)
        else:
            assert sent == set(arrived) == jobs
            assert copies <= in_doubt
            assert arrived.total() <= len(jobs) + len(in_doubt)
            assert point not in IN_DOUBT or copies
        assert len({mail.message_id for mail in inbox.mails}) == len(arrived)
        assert all(gap_of(inbox.mails, sender) >= GAP.total_seconds() for sender in senders)
        assert all(most_of(inbox.mails, sender, WINDOW) <= LIMIT for sender in senders)
        assert await jobs_not_ended_by_their_last_attempt(world) == []
        await world.check_counts()


async def left_behind(world: World) -> list[int]:
    """Return the jobs of killed dispatchers: all other leases are ten times as long."""
    rows = await world.sql(
        "SELECT id FROM email_jobs WHERE state = 2 AND lease_until < now() + interval '2 s'"
    )
    return [row.id for row in rows]


async def without_outcome(world: World) -> set[int]:
    """Return the jobs that have an attempt with an unknown outcome."""
    unknown = [AttemptOutcome.LEASE_EXPIRED, AttemptOutcome.IN_DOUBT]
    rows = await world.sql(
        "SELECT email_job_id AS id FROM attempts WHERE outcome = ANY(%s)", unknown
    )
    return {row.id for row in rows}


async def jobs_not_ended_by_their_last_attempt(world: World) -> list[int]:
    """Return the jobs that were not ended by their last attempt."""
    rows = await world.sql(
        """
        SELECT j.id FROM email_jobs j LEFT JOIN attempts a ON a.email_job_id = j.id
        GROUP BY j.id, j.state, j.attempt
        HAVING count(*) FILTER (WHERE a.outcome = 1) <> (j.state = 3)::int
            OR max(a.attempt) FILTER (WHERE a.outcome = 1) <> j.attempt
        """
    )
    return [row.id for row in rows]
