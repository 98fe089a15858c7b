"""includes/park.lua: a claim takes what users may have, whoever has waited longest."""

from __future__ import annotations

from dataclasses import replace

import pytest

from outbox_server.shared.queue.keys import JobRef
from outbox_server.shared.queue.records import Head, LimitUse
from outbox_server.shared.queue.user_limits import UserLimit
from tests.integration.queue.shard import LEASE_MS, SENDER, Shard, jobs, milliseconds

RECHECK_MS = 30_000
MANY = 40


def sender(number: int, user: str, due: int = -1_000, n: int = 1) -> Head:
    """Return a sender with the jobs number * 100 + 1 and so on."""
    waiting = jobs(*((number * 100 + i, due) for i in range(1, n + 1)))
    return replace(SENDER, sender_id=number, user=user, jobs=waiting)


def none_of(user: str) -> UserLimit:
    return UserLimit(user, first=0, most=0)


@pytest.fixture
async def crowd(shard: Shard) -> Shard:
    """Many senders of eve have waited for longer than one of bert."""
    await shard.load(*(sender(number, "eve") for number in range(10, 10 + MANY)))
    await shard.load(sender(9, "bert", due=-1))
    return shard


async def test_without_limits_the_senders_who_waited_longest_come_first(crowd: Shard) -> None:
    assert await crowd.claimed(MANY) == [number * 100 + 1 for number in range(10, 10 + MANY)]


async def test_a_user_who_may_have_no_more_does_not_stand_before_another(crowd: Shard) -> None:
    assert await crowd.claimed(1, none_of("eve")) == [901]


@pytest.mark.parametrize(("want", "expected"), [(3, [1001, 1101, 901]), (5, [1001, 1101, 901])])
async def test_a_user_gets_as_many_as_the_limit_says(
    crowd: Shard, want: int, expected: list[int]
) -> None:
    assert await crowd.claimed(want, UserLimit("eve", first=2, most=2)) == expected


async def test_what_no_other_user_wants_goes_to_the_user_who_has_much(crowd: Shard) -> None:
    claimed = await crowd.claimed(6, UserLimit("eve", first=1, most=4))
    assert claimed == [1001, 901, 1101, 1201, 1301]


async def test_a_limit_holds_within_one_sender(shard: Shard) -> None:
    without_gap = replace(sender(7, "eve", n=9), gap=milliseconds(0), max_in_flight=9)
    await shard.load(without_gap)
    assert len(await shard.claimed(9, UserLimit("eve", first=1, most=3))) == 3
    assert len(await shard.claimed(9)) == 6


async def test_parked_senders_keep_their_place_and_their_lateness(crowd: Shard) -> None:
    assert (await crowd.claim(1, none_of("eve"))).parked
    await crowd.at(500)
    claimed = await crowd.claim(MANY)
    assert [claim.job.job_id for claim in claimed.claims] == [
        number * 100 + 1 for number in range(10, 10 + MANY)
    ]
    assert {claim.waited for claim in claimed.claims} == {milliseconds(1_500)}
    assert not (await crowd.claim()).parked


async def test_a_claim_names_the_user_of_each_job(crowd: Shard) -> None:
    claimed = await crowd.claim(2, UserLimit("eve", first=1, most=1))
    assert [claim.user for claim in claimed.claims] == ["eve", "bert"]


async def test_many_senders_without_room_are_passed_in_steps_of_bounded_work(shard: Shard) -> None:
    """A claim visits 130 senders at most, and says that there is more to do at once."""
    await shard.load(*(sender(number, "eve") for number in range(10, 310)))
    await shard.load(sender(9, "bert", due=-1))
    for _ in range(2):
        claimed = await shard.claim(1, none_of("eve"))
        assert (claimed.claims, claimed.next_look) == ((), milliseconds(0))
    assert await shard.claimed(1, none_of("eve")) == [901]


async def test_a_parked_sender_is_visited_again_although_the_list_of_them_is_lost(
    crowd: Shard,
) -> None:
    await crowd.claim(100, none_of("eve"))
    await crowd.redis.delete(crowd.prefix + "parked", crowd.prefix + "parked:eve")
    await crowd.at(RECHECK_MS - 1)
    assert await crowd.claimed(1) == []
    await crowd.at(RECHECK_MS)
    assert await crowd.claimed(1) == [1001]


async def test_parked_senders_count_as_ready(crowd: Shard) -> None:
    await crowd.claim(100, none_of("eve"))
    ready = await crowd.queue.count_ready_jobs()
    assert (ready.count, ready.age) == (MANY, milliseconds(1_000))


async def test_an_expired_lease_of_a_parked_sender_counts_in_its_window(shard: Shard) -> None:
    await shard.load(replace(sender(7, "eve", n=2), hourly_limit=1))
    [claim] = (await shard.claim(1)).claims
    await shard.at(LEASE_MS)
    assert await shard.claimed(1, none_of("eve")) == []
    assert list((await shard.sender(7)).window.values()) == [LEASE_MS]
    await shard.settle(claim, LimitUse.UNUSED)


async def test_a_job_given_back_while_its_sender_is_parked_is_claimed_once(shard: Shard) -> None:
    await shard.load(sender(7, "eve", n=2))
    [claim] = (await shard.claim(1)).claims
    await shard.settle(claim, LimitUse.UNUSED, give_back=True, retry_at=-1_000)
    assert await shard.claimed(1, none_of("eve")) == []
    assert (await shard.claim(9)).claims[0].job == JobRef(701, 1)
    assert await shard.claimed(9) == []


async def test_a_claim_skips_places_of_parked_senders_that_were_served_meanwhile(
    crowd: Shard,
) -> None:
    await crowd.load(sender(5, "eve", due=-2_000), sender(6, "eve", due=-2_000))
    assert await crowd.claimed(1, none_of("eve")) == [901]
    # They are in `ready` again, and claimed from there while their places among the parked remain.
    await crowd.load(sender(10, "eve", due=-5_000), sender(11, "eve", due=-5_000))
    assert await crowd.claimed(2) == [1001, 1101]
    assert await crowd.claimed(1, none_of("eve")) == []
    assert await crowd.claimed(2) == [501, 601]
    assert await crowd.claimed(1) == [1201]
