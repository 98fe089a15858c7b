"""includes/circuit.lua: at the relay, what a user's mail may have caused stops that user alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from outbox_server.shared.queue.records import Claim, Contact, LimitUse
from outbox_server.shared.queue.user_limits import UserLimit
from tests.integration.queue.shard import LEASE_MS, START_MS, Shard
from tests.integration.queue.test_circuit import sender

EVE, BERT = "relay:eve", "relay:bert"
NOT_BERT = UserLimit("bert", first=0, most=0)


@pytest.fixture
async def users(shard: Shard) -> Shard:
    """Eve has the senders 1 and 2, bert has 3 and 4. All use the relay."""
    for number, endpoint in ((1, EVE), (2, EVE), (3, BERT), (4, BERT)):
        user = endpoint.removeprefix("relay:")
        await shard.load(replace(sender(number, endpoint=endpoint), user=user, max_in_flight=3))
    return shard


async def fail(shard: Shard, claim: Claim, reason: str = "", *, before_mail: bool = False) -> None:
    await shard.settle(
        claim,
        LimitUse.BEGUN,
        connection_error=reason or "cut",
        before_mail=before_mail,
        retry_at=shard.now + 600_000,
    )


async def fail_all(shard: Shard, *senders: int, before_mail: bool = False) -> None:
    """Let all jobs of these senders fail that a claim takes now; give the others back."""
    claims = (await shard.claim()).claims
    for claim in claims:
        if claim.sender_id in senders:
            await fail(shard, claim, f"of {claim.sender_id}", before_mail=before_mail)
    for claim in claims:
        if claim.sender_id not in senders:
            await shard.settle(claim, LimitUse.UNUSED, retry_at=0, give_back=True)


async def senders_of(shard: Shard, *limits: UserLimit) -> set[int]:
    return {claim.sender_id for claim in (await shard.claim(100, *limits)).claims}


async def test_mail_that_ends_its_connection_stops_its_user_alone(users: Shard) -> None:
    await fail_all(users, 1, 2)
    assert await senders_of(users) == {3, 4}
    assert await users.circuit("relay") == {}
    assert "open" in await users.circuit(EVE)


async def test_a_relay_that_opens_no_session_stops_all_users(users: Shard) -> None:
    await fail_all(users, 1, 2, before_mail=True)
    assert await senders_of(users) == set()
    assert "open" in await users.circuit("relay")
    assert await users.circuit(EVE) == {}


async def test_failures_of_different_users_open_the_circuit_for_all(users: Shard) -> None:
    [claims] = [(await users.claim()).claims]
    by_sender = {claim.sender_id: claim for claim in claims}
    for sender_id in (1, 3, 4):
        await fail(users, by_sender[sender_id], before_mail=True)
    assert "open" in await users.circuit("relay")


async def test_a_user_sees_nothing_of_the_failures_of_another(users: Shard) -> None:
    await fail_all(users, 1, 2)
    assert await users.queue.circuits_of_sender(3) == ()
    [circuit] = await users.queue.circuits_of_sender(1)
    assert circuit.reason == "of 2"


async def test_both_circuits_of_a_sender_are_reported(users: Shard) -> None:
    await fail_all(users, 1, 2)
    await fail_all(users, 3, 4, before_mail=True)
    assert len(await users.queue.circuits_of_sender(1)) == 2
    assert len(await users.queue.circuits_of_sender(3)) == 1


async def test_any_reply_opens_the_relay_again_for_all_but_the_user_who_is_stopped(
    users: Shard,
) -> None:
    await fail_all(users, 1, 2)
    await fail_all(users, 3, 4, before_mail=True)
    await users.at(5_000)
    [probe] = (await users.claim()).claims
    await users.settle(probe, LimitUse.COUNTED, contact=Contact.ANSWERED)
    assert "open" not in await users.circuit("relay")


async def probe_of_eve(shard: Shard) -> Claim:
    """Stop all users, and let a mail of eve be the probe."""
    await fail_all(shard, 1, 2, before_mail=True)
    await shard.at(5_000)
    [probe] = (await shard.claim(100, NOT_BERT)).claims
    assert probe.sender_id in (1, 2)
    assert await senders_of(shard) == set()
    return probe


async def test_a_probe_that_ends_its_connection_after_mail_shows_that_the_relay_replies(
    users: Shard,
) -> None:
    await fail(users, await probe_of_eve(users))
    assert {3, 4} <= await senders_of(users)


async def test_a_probe_that_opens_no_session_postpones_the_next_one(users: Shard) -> None:
    await fail(users, await probe_of_eve(users), before_mail=True)
    assert await senders_of(users) == set()
    assert int((await users.circuit("relay"))["next"]) - START_MS == 5_000 + 25_000


async def test_a_probe_that_lasts_holds_back_the_next_one_for_one_lease(users: Shard) -> None:
    """The mail may be slow by itself."""
    probe = await probe_of_eve(users)
    await users.at(5_000 + LEASE_MS - 1)
    await users.renew(probe)
    assert await senders_of(users) == set()
    await users.at(5_000 + LEASE_MS)
    assert len(await senders_of(users)) == 1


async def test_a_send_that_was_in_flight_when_the_relay_failed_does_not_open_it(
    users: Shard,
) -> None:
    claims = (await users.claim()).claims
    [late, *rest] = [claim for claim in claims if claim.sender_id == 1]
    for claim in (*rest, *(each for each in claims if each.sender_id != 1)):
        await fail(users, claim, before_mail=True)
    await fail(users, late)
    assert "open" in await users.circuit("relay")


async def test_senders_that_an_older_release_loaded_leave_its_circuits_with_their_next_load(
    shard: Shard,
) -> None:
    """Older releases have one key for the relay and others for all endpoints, and no users."""
    for number, endpoint in ((1, "relay"), (2, "relay"), (3, "old"), (4, "old")):
        await shard.load(replace(sender(number, endpoint=endpoint), user="", max_in_flight=3))
        await shard.redis.hdel(f"{shard.prefix}sender:{number}", "user")
    assert await senders_of(shard, NOT_BERT) == {1, 2, 3, 4}


async def test_the_circuit_of_an_older_release_stops_nobody_after_the_next_load(
    shard: Shard,
) -> None:
    old = [replace(sender(n, endpoint="old"), user="", max_in_flight=3) for n in (1, 2, 3)]
    await shard.load(*old)
    await fail_all(shard, 1, 2)
    assert await senders_of(shard) == set()
    assert "open" in await shard.circuit("old")
    await shard.load(*(replace(head, user="bert", endpoint="new") for head in old))
    assert await senders_of(shard) == {1, 2, 3}
