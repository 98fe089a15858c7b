"""A whole dispatcher on real stores, with real SMTP servers."""

from __future__ import annotations

import asyncio
import email
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from email import policy
from pathlib import Path
from typing import Any

import pytest
from outbox.v1 import dispatcher_pb2

from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.deploy.ports import free_port
from outbox_server.services.dispatcher import dispatcher as dispatcher_module
from outbox_server.shared.states import AttemptOutcome, JobState, SenderState
from tests.dispatchers import RunningDispatcher, options, process, running, settings_of
from tests.eventually import eventually
from tests.scheduler_stack import refusal_of
from tests.smtp_servers import Close, Say, ScriptedServer, Succeed, Wait
from tests.table_locks import locked
from tests.world import World, jobs_in

Configure = Callable[..., dict[str, str]]


@pytest.fixture
def configure(database_url: str, redis_url: str) -> Configure:
    def build(smtp_url: str, **changes: str | int) -> dict[str, str]:
        return options(database_url, redis_url, smtp_url, **changes)

    return build


@pytest.fixture(autouse=True)
def _no_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable polling: the dispatcher acts only on computed times and on wake-ups."""
    monkeypatch.setattr(dispatcher_module, "HEARTBEAT", timedelta(hours=1))


@asynccontextmanager
async def working(values: dict[str, str]) -> AsyncIterator[tuple[World, RunningDispatcher]]:
    settings = settings_of(values)
    async with World(settings) as world, running(settings) as dispatcher:
        yield world, dispatcher


# Sending -------------------------------------------------------------------------------------


async def test_every_mail_arrives_once(configure: Configure, inbox: Inbox) -> None:
    async with working(configure(inbox.url)) as (world, _):
        senders = [await world.sender(display_name="Ännä") for _ in range(3)]
        jobs = [job for sender in senders for job in await world.schedule(sender, 20)]
        await eventually(world.done)

        assert await world.states() == {JobState.SENT: 60}
        assert jobs_in(inbox.mails) == dict.fromkeys(jobs, 1)
        await world.check_counts()
        for job in jobs:
            [attempt] = await world.attempts(job)
            assert (attempt.outcome, attempt.counted) == (AttemptOutcome.SENT, True)
            assert (attempt.smtp_code, attempt.enhanced_code) == (250, "2.0.0")
    mail = email.message_from_bytes(
        (inbox.maildir / "new" / inbox.mails[0].file).read_bytes(), policy=policy.default
    )
    assert mail["Subject"] == "Mail"
    assert mail["From"].addresses[0].display_name == "Ännä"
    assert mail.get_content() == "Hello\r\n"


async def test_expired_and_suppressed_jobs_end_unsent_and_delay_no_other_mail(
    configure: Configure, inbox: Inbox
) -> None:
    async with working(configure(inbox.url, min_gap="20ms")) as (world, _):
        sender = await world.sender(limit=100)
        jobs = await world.schedule(sender, 300, load=False)
        await world.sql("UPDATE email_jobs SET expires_at = now() WHERE id = ANY(%s)", jobs[:200])
        await world.sql(
            "INSERT INTO suppressions (user_id, address) VALUES ('anna', 'r250@y.test')"
        )
        await world.loader.load([sender], committed=True)
        await eventually(world.done)
        states = await world.states()
        assert (states[JobState.EXPIRED], states[JobState.SUPPRESSED]) == (200, 1)
        await world.check_counts()
    assert set(jobs_in(inbox.mails)) == set(jobs[200:]) - {jobs[249]}


async def test_an_attempt_is_never_recorded_as_ended_too_early(
    configure: Configure, inbox: Inbox
) -> None:
    async with working(configure(inbox.url)) as (world, _):
        jobs = await world.schedule(await world.sender(), 10)
        await eventually(world.done)
        seen = {next(iter(jobs_in([mail]))): mail for mail in inbox.mails}
        for job in jobs:
            [attempt] = await world.attempts(job)
            # A recorded end is never early. Both times are late by the time to reach PostgreSQL.
            late = attempt.ended_at - seen[job].received_at
            assert late >= 0
            assert attempt.started_at - seen[job].started_at <= late + 0.001


async def test_no_mail_is_sent_before_it_is_due(configure: Configure, inbox: Inbox) -> None:
    async with working(configure(inbox.url)) as (world, _):
        spacing = timedelta(milliseconds=40)
        jobs = await world.schedule(
            await world.sender(), 8, due=timedelta(milliseconds=100), spacing=spacing
        )
        due = {job: (await world.job(job)).scheduled_at.timestamp() for job in jobs}
        await eventually(world.done)

        assert len(inbox.mails) == 8
        for mail in inbox.mails:
            [job] = jobs_in([mail])
            assert mail.started_at >= due[job]


async def test_a_mail_that_cannot_be_built_fails_alone(configure: Configure, inbox: Inbox) -> None:
    async with working(configure(inbox.url)) as (world, _):
        sender = await world.sender()
        bad, good = await world.schedule(sender, 2, due=timedelta(hours=1))
        await world.sql("UPDATE email_jobs SET recipient = 'a@b@c' WHERE id = %s", bad)
        await world.due_now(sender)
        await eventually(world.done)

        assert jobs_in(inbox.mails) == {good: 1}
        [attempt] = await world.attempts(bad)
        assert attempt.outcome is AttemptOutcome.PERMANENT_FAILURE
        assert not attempt.counted
        assert (attempt.message or "").startswith("ADDRESS_INVALID: ")
        assert (await world.job(bad)).state == JobState.FAILED
        await world.check_counts()


# Retries -------------------------------------------------------------------------------------


async def test_a_4xx_reply_is_retried_by_the_backoff(configure: Configure) -> None:
    plan = {"rcpt": [Say("451 4.4.0 no route"), Say("452 4.5.3 too many")]}
    async with ScriptedServer(plan) as server, working(configure(server.url)) as (world, _):
        [job] = await world.schedule(await world.sender())
        await eventually(world.done)

        first, second, third = await world.attempts(job)
        assert (first.outcome, first.smtp_code, first.enhanced_code, first.message) == (
            AttemptOutcome.TEMPORARY_FAILURE,
            451,
            "4.4.0",
            "4.4.0 no route",
        )
        assert (second.smtp_code, second.enhanced_code) == (452, "4.5.3")
        assert (third.outcome, third.smtp_code) == (AttemptOutcome.SENT, 250)
        assert [a.counted for a in (first, second, third)] == [False, False, True]
        # 100 ms and 200 ms, at most a tenth of jitter, and the delay of a busy machine.
        assert 0.1 <= second.started_at - first.ended_at < 10
        assert 0.2 <= third.started_at - second.ended_at < 10
        assert (await world.job(job)).failures == 2
        assert len(server.taken) == 1
        await world.check_counts()


async def test_a_job_fails_after_the_last_step_of_the_backoff(configure: Configure) -> None:
    async with (
        ScriptedServer({"body": Say("451 4.4.0 no route")}) as server,
        working(configure(server.url, retry_backoff="20ms,30ms")) as (world, _),
    ):
        [job] = await world.schedule(await world.sender())
        await eventually(world.done)

        assert (await world.job(job)).state == JobState.FAILED
        attempts = await world.attempts(job)
        assert [a.attempt for a in attempts] == [1, 2, 3]
        # Their bodies had begun, so each took an entry of the window.
        assert all(a.counted for a in attempts)
        await world.check_counts()


async def test_a_5xx_reply_fails_the_job_at_once_with_its_reason(configure: Configure) -> None:
    plan = {"rcpt": [Succeed(), Say("550-5.1.1 no such\r\n550 5.1.1 mailbox")]}
    async with ScriptedServer(plan) as server, working(configure(server.url)) as (world, _):
        good, bad, also_good = await world.schedule(await world.sender(max_in_flight=1), 3)
        await eventually(world.done)

        assert await world.in_state(JobState.FAILED) == {bad}
        [attempt] = await world.attempts(bad)
        assert (attempt.outcome, attempt.smtp_code) == (AttemptOutcome.PERMANENT_FAILURE, 550)
        assert (attempt.enhanced_code, attempt.message) == ("5.1.1", "5.1.1 no such\n5.1.1 mailbox")
        assert set(jobs_in(server.taken)) == {good, also_good}
        await world.check_counts()


async def test_a_server_that_recovers_gets_the_waiting_mail(configure: Configure) -> None:
    """An outage of any length fails no mail, even if there is only one."""
    server = ScriptedServer()
    await server.start()
    await server.stop()
    values = configure(server.url, retry_backoff="20ms,20ms")
    async with working(values) as (world, dispatcher):
        [job] = await world.schedule(await world.sender())

        async def tried_often() -> bool:
            return len(await world.attempts(job)) > 6

        await eventually(tried_often)
        status = await dispatcher.status()
        assert status.endpoints[0].port == server.port
        assert "Connection refused" in status.endpoints[0].last_error
        await server.start()
        await eventually(world.done)

        attempts = await world.attempts(job)
        assert {a.outcome for a in attempts[:-1]} == {AttemptOutcome.CONNECTION_FAILURE}
        assert attempts[-1].outcome is AttemptOutcome.SENT
        assert jobs_in(server.taken) == {job: 1}
        await server.stop()


async def test_a_mail_in_doubt_is_sent_again_under_the_same_message_id(
    configure: Configure,
) -> None:
    async with ScriptedServer({"body": [Close()]}) as server:
        async with working(configure(server.url)) as (world, _):
            [job] = await world.schedule(await world.sender())
            await eventually(world.done)

            outcomes = [a.outcome for a in await world.attempts(job)]
            assert outcomes == [AttemptOutcome.IN_DOUBT, AttemptOutcome.SENT]
            await world.check_counts()
        first, copy = server.taken
        assert first.message_id
        assert first.message_id == copy.message_id


async def test_a_mail_in_doubt_is_held_if_the_operator_chose_hold(configure: Configure) -> None:
    async with ScriptedServer({"body": [Close()]}) as server:
        values = configure(server.url, uncertain_policy="hold", retry_backoff="1ms")
        async with working(values) as (world, _):
            sender = await world.sender(max_in_flight=1)
            doubtful, *others = await world.schedule(sender, 4)
            await eventually(world.done)

            assert await world.in_state(JobState.UNCERTAIN) == {doubtful}
            assert await world.in_state(JobState.SENT) == set(others)
            await world.check_counts()
        assert jobs_in(server.taken) == dict.fromkeys([doubtful, *others], 1)


async def test_an_internal_failure_neither_stops_the_dispatcher_nor_fails_the_mail(
    configure: Configure, inbox: Inbox
) -> None:
    async with working(configure(inbox.url, retry_backoff="1h")) as (world, _):
        sender = await world.sender()
        broken, good = await world.schedule(sender, 2, due=timedelta(hours=1))
        await world.sql("UPDATE email_jobs SET variables = 'no JSON' WHERE id = %s", broken)
        await world.due_now(sender)
        await eventually(lambda: world.attempts(broken))
        await world.sql("UPDATE email_jobs SET variables = NULL WHERE id = %s", broken)
        await world.due_now(sender)
        await eventually(world.done)

        assert jobs_in(inbox.mails) == {broken: 1, good: 1}
        attempt = (await world.attempts(broken))[0]
        assert attempt.outcome is AttemptOutcome.TEMPORARY_FAILURE
        assert attempt.message == "internal error of the dispatcher"


# Changes between the claim and the mark ------------------------------------------------------


async def test_a_job_that_is_cancelled_after_its_claim_is_never_sent(
    configure: Configure, inbox: Inbox
) -> None:
    async with working(configure(inbox.url)) as (world, _):
        sender = await world.sender()
        async with await world.connect() as caller:
            async with caller.transaction():
                jobs = await world.schedule(sender, 2, load=False)
                # The row is locked, so that its mark leaves it out until the cancel commits.
                assert await world.cancel(jobs[:1], caller) == 1
                await world.loader.load([sender], committed=True)
                await eventually(lambda: jobs[1] in jobs_in(inbox.mails))
            await eventually(world.done)

        assert await world.in_state(JobState.CANCELLED) == {jobs[0]}
        assert jobs_in(inbox.mails) == {jobs[1]: 1}
        assert await world.attempts(jobs[0]) == []
        await eventually(lambda: claimed(world, sender, 0))
        await world.check_counts()


async def test_a_sender_that_is_paused_after_the_claim_sends_nothing_until_it_is_resumed(
    configure: Configure, inbox: Inbox
) -> None:
    async with working(configure(inbox.url)) as (world, _):
        sender = await world.sender()
        jobs = await world.schedule(sender, 2, load=False)
        async with await world.connect() as holder:
            async with holder.transaction():
                # The table is locked, so that their mark cannot begin.
                await holder.execute("LOCK TABLE email_jobs IN SHARE ROW EXCLUSIVE MODE")
                await world.loader.load([sender], committed=True)
                await eventually(lambda: claimed(world, sender, 2))
                await eventually(lambda: blocked(world))
                await world.change(sender, load=False, state=SenderState.PAUSED)
            await eventually(lambda: claimed(world, sender, 0))
        await world.loader.load([sender], committed=True)

        assert await world.states() == {JobState.SCHEDULED: 2}
        assert {(await world.job(job)).attempt for job in jobs} == {0}
        assert inbox.mails == []
        await world.change(sender, state=SenderState.ACTIVE)
        await eventually(world.done)
        assert jobs_in(inbox.mails) == dict.fromkeys(jobs, 1)
        assert [(await world.job(job)).attempt for job in jobs] == [1, 1]


async def claimed(world: World, sender: int, n: int) -> bool:
    return await world.leases_in_redis(sender) == n


async def blocked(world: World) -> bool:
    rows = await world.sql(
        "SELECT count(*) AS n FROM pg_stat_activity"
        " WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    return bool(rows[0].n)


# Wake-ups ------------------------------------------------------------------------------------


async def asleep(world: World) -> bool:
    keys = world.queues[0].keys
    return bool(await world.redis.exists(keys.ready.replace("ready", "asleep")))


async def test_a_mail_for_now_wakes_a_dispatcher_that_sleeps_until_later(
    configure: Configure, inbox: Inbox
) -> None:
    async with working(configure(inbox.url)) as (world, _):
        sender = await world.sender()
        await world.schedule(sender, due=timedelta(hours=1))
        await eventually(lambda: asleep(world))
        [job] = await world.schedule(sender)
        # Neither the next look nor the heartbeat comes within an hour.
        await eventually(lambda: inbox.mails)

        assert jobs_in(inbox.mails) == {job: 1}


async def test_a_sender_that_is_resumed_wakes_a_dispatcher_that_has_nothing_to_do(
    configure: Configure, inbox: Inbox
) -> None:
    async with working(configure(inbox.url)) as (world, _):
        sender = await world.sender(state=SenderState.PAUSED)
        await world.schedule(sender, 3)
        await eventually(lambda: asleep(world))
        assert inbox.mails == []
        await world.change(sender, state=SenderState.ACTIVE)
        await eventually(world.done)

        assert len(inbox.mails) == 3


# DrainDispatcher and status ------------------------------------------------------------------


@asynccontextmanager
async def four_in_flight() -> AsyncIterator[tuple[ScriptedServer, asyncio.Event, asyncio.Event]]:
    """Accept mails so that two are in their body and two wait for the reply to RCPT.

    There are five slots, one of which is reserved for endpoints that are not slow.
    """
    before, after = asyncio.Event(), asyncio.Event()
    plan = {
        "rcpt": [Succeed(), Succeed(), (Wait(before), Succeed()), (Wait(before), Succeed())],
        "body": (Wait(after), Succeed()),
    }
    async with ScriptedServer(plan) as server:
        yield server, before, after


def begun(server: ScriptedServer) -> bool:
    return server.waiting["rcpt"] == 2 and server.waiting["body"] == 2


async def check_drained(world: World, server: ScriptedServer) -> None:
    """Check that mails in their body were sent, and that the others wait and used no attempt."""
    sent = set(jobs_in(server.taken))
    assert await world.states() == {JobState.SENT: 2, JobState.SCHEDULED: 4}
    assert await world.in_state(JobState.SENT) == sent
    waiting = await world.in_state(JobState.SCHEDULED)
    assert {(await world.job(job)).attempt for job in waiting} == {0}
    assert not any([await world.attempts(job) for job in waiting])
    await world.check_counts()


async def in_flight(dispatcher: RunningDispatcher, n: int) -> bool:
    return (await dispatcher.status()).in_flight_count == n


async def test_on_drain_mails_being_transmitted_finish_and_all_others_return_to_the_queue(
    configure: Configure, inbox: Inbox
) -> None:
    async with four_in_flight() as (server, before, after):
        values = configure(server.url, dispatcher_concurrency=5)
        async with working(values) as (world, dispatcher):
            sender = await world.sender(max_in_flight=4)
            jobs = await world.schedule(sender, 6)
            await eventually(lambda: begun(server))
            # A claim under way takes the free slots for a moment.
            await eventually(lambda: in_flight(dispatcher, 4))
            assert (await dispatcher.status()).concurrency == 5
            # One that is refused begins no drain.
            refused = await refusal_of(dispatcher.drain(identity="\0", reason="\0"))
            assert set(refused.violations) == {"identity", "reason"}
            assert not await is_draining(dispatcher)
            said = "carol@example.com", "new kernel"
            asked: dict[str, Any] = {"identity": said[0], "reason": said[1], "request_id": "once"}
            draining = asyncio.create_task(dispatcher.drain(**asked))
            await eventually(lambda: is_draining(dispatcher))
            at_once = asyncio.create_task(dispatcher.drain(**asked))
            before.set()
            await eventually(lambda: server.waiting["rcpt"] == 0)
            assert not draining.done()
            after.set()
            answer = await draining

            assert answer.given_back_count == 2
            assert answer.status.state == dispatcher_pb2.DISPATCHER_STATE_DRAINING
            assert answer.status.in_flight_count == 0
            assert answer.status.rates.sent_count == 2
            await check_drained(world, server)
            # It reports the drain, still answers calls, and can be drained again.
            assert not await dispatcher.serving()
            assert (await dispatcher.drain()).given_back_count == 2
            # Calls with one id have one answer, whose times and rates are those of then.
            assert await at_once == await dispatcher.drain(**asked) == answer
            asked["reason"] = "another"
            assert (await refusal_of(dispatcher.drain(**asked))).reason == "REQUEST_ID_REUSED"
            # The audit log says who began it.
            recorded = await world.sql(
                "SELECT actor, action, target, user_id, identity, reason, before, after"
                " FROM audit_events"
            )
            assert recorded == [
                (
                    "local",
                    "DrainDispatcher",
                    f"dispatchers/{answer.status.dispatcher_id}",
                    None,
                    *said,
                    {"state": "SERVING"},
                    {"state": "DRAINING"},
                )
            ]
            # Another dispatcher takes over at once: no lease remains.
            async with running(settings_of(configure(inbox.url))) as successor:
                # A call that was repeated at the address of its predecessor does not drain it.
                asked["reason"] = said[1]
                refused = await refusal_of(successor.drain(**asked))
                assert (refused.code, refused.reason) == ("ALREADY_EXISTS", "REQUEST_ID_REUSED")
                await eventually(world.done)
            assert set(jobs_in(inbox.mails)) == set(jobs) - set(jobs_in(server.taken))


async def is_draining(dispatcher: RunningDispatcher) -> bool:
    state = (await dispatcher.status()).state
    return bool(state == dispatcher_pb2.DISPATCHER_STATE_DRAINING)


async def test_a_caller_that_leaves_does_not_end_the_drain(configure: Configure) -> None:
    async with four_in_flight() as (server, before, after):
        values = configure(server.url, dispatcher_concurrency=5)
        async with working(values) as (world, dispatcher):
            await world.schedule(await world.sender(max_in_flight=4), 6)
            await eventually(lambda: begun(server))
            draining = asyncio.create_task(dispatcher.drain())
            await eventually(lambda: is_draining(dispatcher))
            # The server sees the same when a deadline passes.
            draining.cancel()
            await asyncio.wait([draining])
            assert draining.cancelled()
            before.set()
            after.set()
            await eventually(lambda: is_idle(dispatcher))

            assert await is_draining(dispatcher)
            await check_drained(world, server)


async def is_idle(dispatcher: RunningDispatcher) -> bool:
    return (await dispatcher.status()).in_flight_count == 0


async def test_a_drain_that_cannot_be_recorded_is_made_all_the_same(
    configure: Configure, database_url: str, inbox: Inbox
) -> None:
    async with working(configure(inbox.url)) as (world, dispatcher):
        await world.sql("ALTER TABLE audit_events ADD CONSTRAINT no_ CHECK (false) NOT VALID")
        try:
            # Nobody can know whether it is a repeated call.
            async with locked(database_url, "change_requests"):
                refused = await refusal_of(dispatcher.drain(request_id="once"))
            assert (refused.code, refused.reason) == ("UNAVAILABLE", "DATABASE_UNAVAILABLE")
            assert not await is_draining(dispatcher)
            answer = await dispatcher.drain(reason="new kernel")
        finally:
            await world.sql("ALTER TABLE audit_events DROP CONSTRAINT no_")
        assert answer.status.state == dispatcher_pb2.DISPATCHER_STATE_DRAINING


async def test_on_sigterm_mails_being_transmitted_finish_and_all_others_return_to_the_queue(
    configure: Configure, tmp_path: Path
) -> None:
    async with four_in_flight() as (server, before, after):
        values = configure(server.url, dispatcher_concurrency=5)
        async with World(settings_of(values)) as world:
            await world.schedule(await world.sender(max_in_flight=4), 6)
            async with process(values, tmp_path / "log") as child:
                await eventually(lambda: begun(server))
                ending = asyncio.create_task(child.terminate())
                await eventually(child.not_serving)
                before.set()
                await eventually(lambda: server.waiting["rcpt"] == 0)
                after.set()
                assert await ending == 0
                assert "Traceback" not in child.log()
            await check_drained(world, server)
            key = world.queues[0].keys.ready.replace("ready", "lease:*")
            assert await world.redis.keys(key) == []


async def test_the_status_shows_rates_and_endpoints(configure: Configure, inbox: Inbox) -> None:
    async with working(configure(inbox.url, dispatcher_concurrency=7, retry_backoff="1h")) as (
        world,
        dispatcher,
    ):
        port = free_port()
        well = await world.sender()
        await world.schedule(well, 9)
        failing = await world.sender(smtp_host="127.0.0.1", smtp_port=port, smtp_security=1)
        [waiting] = await world.schedule(failing)
        await eventually(lambda: world.done(well))
        await eventually(lambda: world.attempts(waiting))
        await eventually(lambda: is_idle(dispatcher))
        status = await dispatcher.status()

        assert status.state == dispatcher_pb2.DISPATCHER_STATE_SERVING
        assert status.dispatcher_id
        assert (status.in_flight_count, status.concurrency) == (0, 7)
        assert status.rates.sent_count == 9
        assert status.rates.attempt_count == 9 + len(await world.attempts(waiting))
        assert 0 < status.rates.sent_per_second < status.rates.attempts_per_second
        assert status.uptime.ToTimedelta() > timedelta(0)
        ends = {end.port: end for end in status.endpoints}
        assert set(ends) == {inbox.port, port}
        assert ends[inbox.port].host == "127.0.0.1"
        assert 1 <= ends[inbox.port].connection_count <= 7
        assert ends[inbox.port].last_error == ""
        assert not ends[inbox.port].HasField("last_error_time")
        assert ends[port].connection_count == 0
        assert ends[port].last_error
        assert ends[port].HasField("last_error_time")
        assert await dispatcher.serving()


async def test_a_missing_column_delays_outcomes_until_it_is_back_and_ends_no_process(
    new_database: Callable[[], str], redis_url: str, inbox: Inbox
) -> None:
    settings = settings_of(options(new_database(), redis_url, inbox.url))
    async with World(settings) as world, running(settings) as dispatcher:
        await eventually(dispatcher.serving)
        await world.sql("ALTER TABLE attempts RENAME COLUMN message TO words")
        job, *_ = await world.schedule(await world.sender())
        await eventually(lambda: jobs_in(inbox.mails) == {job: 1})

        async def not_serving() -> bool:
            return not await dispatcher.serving()

        await eventually(not_serving)
        assert await world.in_state(JobState.SENDING) == {job}
        await world.sql("ALTER TABLE attempts RENAME COLUMN words TO message")
        await eventually(world.done)
        await eventually(dispatcher.serving)
        assert await world.in_state(JobState.SENT) == {job}
    assert jobs_in(inbox.mails) == {job: 1}
