"""includes/turns.lua, load_user.lua: the senders of a user share its limits, in turns."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from outbox_server.shared.queue.keys import JobRef
from outbox_server.shared.queue.records import ActiveLease, Head, LimitUse, PastEnd, UserHead
from outbox_server.shared.queue.user_limits import UserSendLimits
from tests.integration.queue.shard import (
    LEASE_MS,
    SENDER,
    WINDOW_MS,
    Shard,
    jobs,
    milliseconds,
)

RECHECK_MS = 30_000


def sender(number: int, n: int = 3, *, user: str = "eve", limited: bool = True) -> Head:
    """Return a sender without limits of its own, with the jobs number * 100 + 1 and so on."""
    waiting = jobs(*((number * 100 + i, -1_000) for i in range(1, n + 1)))
    return replace(
        SENDER,
        sender_id=number,
        user=user,
        user_limited=limited,
        jobs=waiting,
        gap=milliseconds(0),
        max_in_flight=9,
    )


@pytest.fixture
async def trio(shard: Shard) -> Shard:
    """Three senders of a user who may send two mails in a window."""
    await shard.load_user(UserHead("eve", hourly_limit=2))
    await shard.load(*(sender(number) for number in (11, 12, 13)))
    return shard


async def send(shard: Shard, want: int = 100) -> list[int]:
    claims = (await shard.claim(want)).claims
    for claim in claims:
        await shard.settle(claim)
    return [claim.job.job_id for claim in claims]


async def test_the_senders_of_a_user_share_its_window(trio: Shard) -> None:
    assert len(await send(trio)) == 2
    assert await send(trio) == []
    await trio.at(WINDOW_MS - 1)
    assert await send(trio) == []
    await trio.at(WINDOW_MS)
    assert len(await send(trio)) == 2


async def test_leases_count_in_the_window_of_the_user(trio: Shard) -> None:
    claims = (await trio.claim()).claims
    assert len(claims) == 2
    await trio.at(1_000)
    assert await trio.claimed() == []
    await trio.settle(claims[0], LimitUse.UNUSED)
    assert len(await trio.claimed()) == 1


async def test_senders_take_turns_with_one_mail_each(trio: Shard) -> None:
    # The first sender uses the limit alone, since no other waits for a turn yet.
    assert await send(trio) == [1101, 1102]
    order = []
    for window in range(1, 4):
        await trio.at(window * WINDOW_MS)
        order += [job // 100 for job in await send(trio)]
    assert order == [11, 12, 13, 12, 13, 12]


async def test_a_gap_of_the_user_runs_from_the_end_of_a_send_of_any_sender(shard: Shard) -> None:
    await shard.load_user(UserHead("eve", gap=milliseconds(500)))
    await shard.load(*(sender(number) for number in (11, 12)))
    [claim] = (await shard.claim()).claims
    await shard.at(5_000)
    assert await shard.claimed() == []
    await shard.settle(claim)
    await shard.at(5_499)
    assert await shard.claimed() == []
    await shard.at(5_500)
    [claim] = (await shard.claim()).claims
    assert (claim.delayed_by, claim.waited) == ("USER_GAP", milliseconds(0))


async def test_a_claim_names_the_limit_of_the_user_that_delayed_it(trio: Shard) -> None:
    assert len(await send(trio)) == 2
    await trio.at(WINDOW_MS + 20)
    delayed = {(c.delayed_by, c.waited) for c in (await trio.claim()).claims}
    assert delayed == {("USER_HOURLY_LIMIT", milliseconds(20))}


async def test_waiting_senders_cost_nothing_until_the_user_may_send(shard: Shard) -> None:
    await shard.load_user(UserHead("eve", hourly_limit=1))
    await shard.load(*(sender(number) for number in range(10, 50)))
    assert len(await send(shard)) == 1
    await shard.claim()
    looks = await shard.all_ready()
    assert looks.pop("u:eve") == WINDOW_MS
    assert set(looks.values()) == {RECHECK_MS}


async def test_users_do_not_delay_each_other(trio: Shard) -> None:
    await trio.load(sender(9, user="bert", limited=False))
    assert len(await send(trio)) == 2 + 3


async def test_limits_of_all_users_are_those_of_the_dispatcher(shard: Shard) -> None:
    shard.queue._user_limits = "1 0"
    await shard.load(sender(11, limited=False), sender(12, limited=False))
    claimed = await shard.claim()
    # A load brings the limiter of the user.
    assert (claimed.claims, set(claimed.loads)) == ((), {11, 12})
    await shard.load_user(UserHead("eve"))
    await shard.at(5_000)
    assert len(await shard.claimed()) == 1
    shard.queue._user_limits = "3 0"
    await shard.claim(0)
    await shard.at(5_000 + RECHECK_MS)
    assert len(await shard.claimed()) == 2


async def test_a_user_whose_limits_end_is_not_limited_any_more(trio: Shard) -> None:
    assert len(await send(trio)) == 2
    await trio.load(*(sender(number, limited=False) for number in (11, 12, 13)), committed=True)
    assert await trio.redis.keys("*eve*") == []
    assert len(await send(trio)) == 9


async def test_a_limit_that_is_raised_holds_at_once(trio: Shard) -> None:
    assert len(await send(trio)) == 2
    assert await send(trio) == []
    await trio.load_user(UserHead("eve", hourly_limit=5))
    assert (await trio.claim(0)).next_look == milliseconds(0)
    assert len(await send(trio)) == 3


async def test_the_history_of_all_senders_is_restored(shard: Shard) -> None:
    ends = (PastEnd(JobRef(1, 1), milliseconds(1_000), counted=True),)
    leases = (ActiveLease(JobRef(2, 1), milliseconds(3_000)),)
    await shard.load_user(UserHead("eve", 2, None, ends, leases))
    await shard.load(sender(11))
    assert await shard.claimed() == []
    # PostgreSQL knows what became of the lease: all of the user wait for a load.
    await shard.at(WINDOW_MS - 1_000)
    assert await shard.claimed() == []
    await shard.at(WINDOW_MS - 750)
    assert (await shard.claim()).loads == (11,)
    ended = PastEnd(JobRef(2, 1), milliseconds(WINDOW_MS - 3_750), counted=True)
    await shard.load_user(UserHead("eve", 2, None, (ended,)))
    await shard.load(sender(11))
    assert len(await shard.claimed()) == 1
    await shard.at(WINDOW_MS + 2_999)
    assert await shard.claimed() == []


async def test_a_claim_from_before_the_limits_is_not_confirmed(shard: Shard) -> None:
    await shard.load(sender(11, limited=False))
    claims = (await shard.claim(2)).claims
    epochs = await shard.queue.begin_user_loads(["eve"], committed=True)
    # PostgreSQL is read here: it does not show these claims.
    assert await shard.queue.confirm(claims) == [False, False]
    assert await shard.claimed() == []
    assert await shard.queue.load_users([UserHead("eve", hourly_limit=1)], epochs) == []
    assert await shard.queue.confirm(claims) == [False, False]


async def test_a_renewal_moves_both_leases(trio: Shard) -> None:
    claims = (await trio.claim()).claims
    await trio.at(LEASE_MS - 1)
    await trio.renew(*claims)
    await trio.at(2 * LEASE_MS - 2)
    assert await trio.claimed() == []
    assert len((await trio.sender("u:eve")).leases) == 2
    for claim in claims:
        await trio.settle(claim)
    assert (await trio.sender("u:eve")).leases == {}


async def test_a_loss_of_the_limiter_stops_the_senders_until_it_is_loaded(trio: Shard) -> None:
    claims = (await trio.claim()).claims
    await trio.redis.delete(trio.prefix + "lease:u:eve")
    assert await trio.queue.confirm(claims) == [False, False]
    await trio.at(RECHECK_MS)
    claimed = await trio.claim()
    assert claimed.claims == ()
    assert claimed.loads
    leases = tuple(ActiveLease(claim.job, timedelta(seconds=30)) for claim in claims)
    await trio.load_user(UserHead("eve", 2, leases=leases))
    assert await trio.queue.confirm(claims) == [True, True]


async def test_a_job_given_back_frees_a_lease_that_was_restored(shard: Shard) -> None:
    await shard.load_user(UserHead("eve", hourly_limit=1))
    await shard.load(sender(11, n=1))
    [claim] = (await shard.claim()).claims
    await shard.redis.delete(shard.prefix + "sender:u:eve")
    # The mark was read for the history; then the job was given back.
    lease = ActiveLease(claim.job, timedelta(seconds=20))
    await shard.load_user(UserHead("eve", 1, leases=(lease,)))
    await shard.settle(claim, LimitUse.UNUSED, give_back=True, retry_at=-1_000)
    assert await shard.claimed() == [1101]


async def test_a_sender_stays_known_whose_lease_expires_with_a_restored_lease_of_its_user(
    shard: Shard,
) -> None:
    await shard.load_user(UserHead("eve", 2))
    await shard.load(sender(11))
    (first,) = (await shard.claim(1)).claims
    await shard.at(1_000)
    (second,) = (await shard.claim(1)).claims
    await shard.redis.delete(shard.prefix + "sender:u:eve")
    left = ((first, LEASE_MS - 1_000), (second, LEASE_MS))
    leases = tuple(ActiveLease(claim.job, milliseconds(ms)) for claim, ms in left)
    await shard.load_user(UserHead("eve", 2, leases=leases))
    await shard.at(LEASE_MS)
    # The first lease takes an entry of the sender; the data of its user is discarded.
    assert await shard.claimed() == []
    assert await shard.redis.exists(shard.prefix + "sender:u:eve") == 0
    assert await shard.settle(second) == []


async def test_the_state_of_both_limiters_is_read(trio: Shard) -> None:
    assert len(await send(trio)) == 2
    await trio.at(1_000)
    state = await trio.queue.read_limiter(11)
    assert state is not None
    assert state.user is not None
    assert state.user_limits == UserSendLimits(2, timedelta(0))
    assert (state.window_left <= timedelta(0), state.user.window_left) == (
        True,
        milliseconds(WINDOW_MS - 1_000),
    )


async def test_only_mail_that_the_user_may_send_counts_as_ready(trio: Shard) -> None:
    await trio.claim(0)
    assert (await trio.queue.count_ready_jobs()).count >= 2
    assert len(await send(trio)) == 2
    assert (await trio.queue.count_ready_jobs()).count == 0
    await trio.claim()
    assert (await trio.queue.count_ready_jobs()).count == 0
    await trio.at(WINDOW_MS + 30)
    ready = await trio.queue.count_ready_jobs()
    assert (ready.count, ready.age) == (2, milliseconds(30))


async def test_senders_are_forgotten_by_a_shard_that_is_not_theirs(trio: Shard) -> None:
    claims = (await trio.claim(1)).claims
    assert await trio.queue.forget_senders([11, 12, 99]) == 2
    assert await trio.queue.confirm(claims) == [False]
    assert set(await trio.ready()) == {13}


async def test_the_keys_of_a_user_without_mail_expire(shard: Shard) -> None:
    await shard.load_user(UserHead("eve", hourly_limit=2))
    await shard.load(sender(11, n=1))
    assert len(await send(shard)) == 1
    assert (await shard.sender("u:eve")).settings_expire
