"""Circuits in whole dispatchers: a failing endpoint costs only its probes and delays no other."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterable, MutableMapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
from structlog.testing import capture_logs

from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.shared.states import AttemptOutcome, JobState, SmtpSecurity
from tests.dispatchers import RunningDispatcher, options, running, settings_of
from tests.eventually import eventually
from tests.smtp_servers import Close, Say, ScriptedServer, Wait
from tests.world import World, gap_of, jobs_in, mails_of, most_of

Configure = Callable[..., dict[str, str]]
# The plan of the server for each kind of outage; None means that the server is down.
OUTAGES: dict[str, dict[str, Any] | None] = {
    "refuses": None,
    "hangs": {"greeting": Wait()},
    "421": {"greeting": Say("421 4.3.2 closing")},
    "AUTH": {"auth": Say("535 5.7.8 who are you")},
    "closes after the body": {"body": Close()},
}
GAP, WINDOW, LIMIT = 0.02, timedelta(seconds=1), 15
FIRST_WAIT = 0.2
MAILS = 20


@pytest.fixture
def configure(database_url: str, redis_url: str) -> Configure:
    def build(smtp_url: str, **changes: str | int) -> dict[str, str]:
        given = {"retry_backoff": "200ms,300ms", "smtp_timeout": "300ms"} | changes
        return options(database_url, redis_url, smtp_url, **given)

    return build


@asynccontextmanager
async def working(
    values: dict[str, str], dispatchers: int = 1
) -> AsyncIterator[tuple[World, list[RunningDispatcher]]]:
    settings = settings_of(values)
    async with World(settings) as world, AsyncExitStack() as stack:
        yield (
            world,
            [await stack.enter_async_context(running(settings)) for _ in range(dispatchers)],
        )


async def is_idle(dispatcher: RunningDispatcher) -> bool:
    return (await dispatcher.status()).in_flight_count == 0


async def failed_attempts(world: World) -> list[float]:
    """Return the start of each attempt whose connection failed."""
    rows = await world.sql(
        "SELECT extract(epoch FROM started_at)::float8 AS at FROM attempts"
        " WHERE outcome IN (%s, %s) ORDER BY 1",
        int(AttemptOutcome.CONNECTION_FAILURE),
        int(AttemptOutcome.IN_DOUBT),
    )
    return [row.at for row in rows]


@pytest.mark.parametrize(
    ("kind", "dispatchers"), [*((kind, 1) for kind in OUTAGES), ("refuses", 3), ("hangs", 3)]
)
async def test_an_outage_uses_only_the_attempts_of_its_probes(
    configure: Configure, inbox: Inbox, kind: str, dispatchers: int
) -> None:
    plan = OUTAGES[kind]
    extensions = ("8BITMIME", "AUTH PLAIN") if kind == "AUTH" else ("8BITMIME",)
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(ScriptedServer(plan, extensions=extensions))
        logs = stack.enter_context(capture_logs())
        if plan is None:
            await server.stop()
        login = "anna:secret@" if kind == "AUTH" else ""
        values = configure(
            f"smtp://{login}127.0.0.1:{server.port}",
            min_gap=f"{GAP}s",
            rate_window="1s",
            smtp_timeout="300ms" if kind == "hangs" else "60s",
        )
        async with working(values, dispatchers) as (world, running_ones):
            senders = [await world.sender(limit=LIMIT) for _ in range(3)]
            jobs = [job for sender in senders for job in await world.schedule(sender, MAILS)]
            queue = world.loader.queue_of(senders[0])
            await eventually(lambda: queue.circuits_of_sender(senders[0]))
            began = len(await failed_attempts(world))
            # One send at a time per sender, and the jobs claimed before the third failure was
            # known.
            assert began <= 3 + 5 * dispatchers

            # Another endpoint works, and its mail does not wait.
            well = await world.sender(
                smtp_host="127.0.0.1", smtp_port=inbox.port, smtp_security=int(SmtpSecurity.NONE)
            )
            await world.schedule(well, 10)
            await eventually(lambda: world.done(well))
            assert len(mails_of(inbox.mails, well)) == 10
            assert await queue.circuits_of_sender(senders[0])

            shown = [
                endpoint
                for each in running_ones
                for endpoint in (await each.status()).endpoints
                if endpoint.port == server.port
            ]
            assert shown
            assert all(
                endpoint.HasField("circuit_open_time") and endpoint.HasField("next_probe_time")
                for endpoint in shown
            )

            # When each dispatcher has been idle, no send from before the opening is in flight.
            for each in running_ones:
                await eventually(partial(is_idle, each))
            calm = time.time()
            await eventually(lambda: _failed_since(world, calm, 3))
            states = await world.states(*senders)
            assert states[JobState.SCHEDULED] + states[JobState.SENDING] == len(jobs)
            assert states[JobState.SENDING] <= 1

            server.plan.clear()
            if plan is None:
                await server.start()
            await eventually(world.done)

            assert await world.states(*senders) == {JobState.SENT: len(jobs)}
            starts = await failed_attempts(world)
            _check_probes(starts, calm)
            assert len(starts) <= 3 + 5 * dispatchers + (starts[-1] - starts[0]) / FIRST_WAIT
            if kind == "closes after the body":
                copies = jobs_in(server.taken)
                assert sum(copies.values()) == len(jobs) + len(starts)
            else:
                await _check_copies(world, server, jobs, kind)
            for sender in senders:
                assert gap_of(server.taken, sender) >= GAP
                assert most_of(server.taken, sender, WINDOW) <= LIMIT
            assert await queue.circuits_of_sender(senders[0]) == ()
            await world.check_counts()
            opened, closed = _logged(logs, f"127.0.0.1:{server.port}")
            assert (opened["event"], closed["event"]) == ("circuit_opened", "circuit_closed")
            assert opened["since"] == closed["since"]


async def _check_copies(
    world: World, server: ScriptedServer, jobs: Iterable[int], kind: str
) -> None:
    """Check that every mail arrived, and only mail that was in doubt more than once."""
    rows = await world.sql(
        "SELECT email_job_id AS id FROM attempts WHERE outcome = %s", int(AttemptOutcome.IN_DOUBT)
    )
    # A busy machine may miss the short limit of "hangs" at the reply to a body.
    assert kind == "hangs" or not rows
    copies = jobs_in(server.taken)
    assert set(copies) == set(jobs)
    assert {job for job, n in copies.items() if n > 1} <= {row.id for row in rows}


def _logged(
    logs: Sequence[MutableMapping[str, Any]], server: str
) -> list[MutableMapping[str, Any]]:
    """Return the log entries about the endpoint's circuit, without those of senders' circuits."""
    reported = [log for log in logs if log["event"].startswith("circuit_") and "sender" not in log]
    assert all(log["endpoint"] == server for log in reported)
    # The reason of a closed circuit may be a reply, which is not logged by default.
    assert all(log.get("reason") or log.get("reply") for log in reported)
    return reported


def _check_probes(starts: Sequence[float], since: float) -> None:
    """Check that probes ran one at a time, each after its wait."""
    probes = [start for start in starts if start > since]
    assert min(b - a for a, b in pairwise(probes)) >= FIRST_WAIT * 0.9


async def _failed_since(world: World, since: float, n: int) -> bool:
    return len([start for start in await failed_attempts(world) if start > since]) >= n
