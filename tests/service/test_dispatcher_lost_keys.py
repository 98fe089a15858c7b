"""Some keys of Redis are lost, as after an eviction: Outbox restores them by itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import pytest

from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.services.dispatcher import recovery as recovery_module
from outbox_server.shared.states import JobState
from tests.dispatchers import options, running, settings_of
from tests.eventually import eventually
from tests.smtp_servers import ScriptedServer, Succeed, Wait
from tests.world import World, at_least, jobs_in, mails_of

Configure = Callable[..., dict[str, str]]

SENDER_KEYS = ("due", "lease", "window", "sender")
# The keys of a sender that are lost at once; "ready" means its entry there.
LOSSES = [*((part,) for part in SENDER_KEYS), ("ready",), (*SENDER_KEYS, "ready")]
# The real value, unlike in most of these tests.
PATROL_PAUSE = recovery_module.PATROL_PAUSE
SHARD_KEYS = ("ready", "generation", "asleep", "rebuild", "life")


@pytest.fixture(autouse=True)
def patrols_are_frequent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery_module, "PATROL_PAUSE", timedelta(milliseconds=100))


@pytest.fixture
def configure(database_url: str, redis_url: str, inbox: Inbox) -> Configure:
    def build(smtp_url: str = inbox.url, **changes: str | int) -> dict[str, str]:
        return options(database_url, redis_url, smtp_url, **changes)

    return build


async def lose(world: World, senders: list[int], kinds: tuple[str, ...]) -> None:
    """Delete keys of these senders, all at once."""
    async with world.redis.pipeline(transaction=True) as pipeline:
        for sender in senders:
            for kind in kinds:
                if kind == "ready":
                    pipeline.zrem("outbox:{0}:ready", sender)
                else:
                    pipeline.delete(f"outbox:{{0}}:{kind}:{sender}")
        await pipeline.execute()


async def test_losing_any_key_under_load_breaks_no_promise(
    configure: Configure, inbox: Inbox
) -> None:
    settings = settings_of(configure(rate_window="1s", min_gap="20ms", lease="2s"))
    async with World(settings) as world, running(settings), running(settings):
        limits = {await world.sender(limit=n): n for n in (7, 1_000, 1_000, 1_000, 1_000)}
        jobs = [job for each in limits for job in await world.schedule(each, 24)]
        share = 0
        for kinds in LOSSES:
            await eventually(partial(at_least, share := share + 8, inbox.mails))
            await lose(world, [*limits], kinds)
        for key in SHARD_KEYS:
            await eventually(partial(at_least, share := share + 4, inbox.mails))
            await world.redis.delete(f"outbox:{{0}}:{key}")
        await eventually(world.done)

        await world.check_sent(inbox.mails, jobs, limits)


async def test_a_sender_at_its_limit_sends_nothing_after_the_loss_of_any_key(
    configure: Configure, inbox: Inbox
) -> None:
    settings = settings_of(configure())
    async with World(settings) as world, running(settings):
        limited, control = await world.sender(limit=2), await world.sender()
        jobs = await world.schedule(limited, 4)
        await eventually(lambda: world.in_state(JobState.SENT))
        for kinds in LOSSES:
            await lose(world, [limited], kinds)
            # A change that makes Redis compute the sender's next look again.
            await world.change(limited, max_in_flight=4)
            await world.schedule(control, 2)
            await eventually(lambda: world.done(control))
            await eventually(lambda: is_known(world, limited))

        assert sorted(jobs_in(mails_of(inbox.mails, limited))) == jobs[:2]


async def is_known(world: World, sender: int) -> bool:
    """Return whether Redis has a head, a history and a next look for the sender."""
    found = await world.redis.exists(
        *(f"outbox:{{0}}:{k}:{sender}" for k in SENDER_KEYS if k != "lease")
    )
    look = await world.redis.zscore("outbox:{0}:ready", str(sender))
    return found == 3 and look is not None


@pytest.mark.parametrize("kinds", LOSSES, ids="+".join)
async def test_a_mail_in_flight_keeps_its_senders_slot_after_the_loss_of_any_key(
    configure: Configure, kinds: tuple[str, ...]
) -> None:
    held = Wait()
    async with ScriptedServer({"body": [(held, Succeed())]}) as server:
        # The reply to the body is held until the sender is restored.
        settings = settings_of(configure(server.url, min_gap="100ms", smtp_timeout="60s"))
        async with World(settings) as world, running(settings), running(settings):
            sender, control = await world.sender(), await world.sender()
            first, second = await world.schedule(sender, 2)
            await eventually(lambda: server.waiting["body"] == 1)
            await lose(world, [sender], kinds)
            await world.schedule(control, 3)
            await eventually(lambda: world.done(control))
            await eventually(lambda: has_lease(world, sender))
            assert len(mails_of(server.taken, sender)) == 1
            # The first mail ends after this, at its reply. PostgreSQL may record its end late.
            released = time.time()
            held.event.set()
            await eventually(world.done)

            assert jobs_in(mails_of(server.taken, sender)) == {first: 1, second: 1}
            assert mails_of(server.taken, sender)[1].started_at - released >= 0.1


async def has_lease(world: World, sender: int) -> bool:
    return await world.leases_in_redis(sender) == 1


@pytest.mark.parametrize("kinds", LOSSES, ids="+".join)
async def test_a_waiting_sender_resumes_in_time_after_the_loss_of_any_key(
    configure: Configure, inbox: Inbox, kinds: tuple[str, ...]
) -> None:
    settings = settings_of(configure())
    async with World(settings) as world, running(settings):
        sender = await world.sender()
        [job] = await world.schedule(sender, due=timedelta(seconds=0.6))
        await lose(world, [sender], kinds)
        await eventually(world.done)

        assert jobs_in(inbox.mails) == {job: 1}
        [attempt] = await world.attempts(job)
        late = attempt.started_at - (await world.job(job)).scheduled_at.timestamp()
        assert 0 <= late < 10


async def test_a_sender_that_lost_only_its_own_keys_resumes_within_10_s(
    configure: Configure, inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery_module, "PATROL_PAUSE", PATROL_PAUSE)
    settings = settings_of(configure())
    async with World(settings) as world, running(settings):
        sender = await world.sender()
        jobs = await world.schedule(sender, 3, due=timedelta(seconds=0.5))
        await lose(world, [sender], (*SENDER_KEYS, "ready"))
        lost = time.time()
        await eventually(world.done)

        assert jobs_in(inbox.mails) == dict.fromkeys(jobs, 1)
        assert max(mail.started_at for mail in inbox.mails) - lost < 10


@pytest.mark.parametrize("key", SHARD_KEYS)
async def test_a_waiting_shard_resumes_in_time_after_the_loss_of_any_of_its_keys(
    configure: Configure, inbox: Inbox, key: str
) -> None:
    settings = settings_of(configure())
    async with World(settings) as world, running(settings):
        sender = await world.sender()
        [job] = await world.schedule(sender, due=timedelta(seconds=0.6))
        await world.redis.delete(f"outbox:{{0}}:{key}")
        await eventually(world.done)

        assert jobs_in(inbox.mails) == {job: 1}
        [attempt] = await world.attempts(job)
        late = attempt.started_at - (await world.job(job)).scheduled_at.timestamp()
        # A sleeping dispatcher that is not woken claims after a heartbeat.
        assert 0 <= late < 10
