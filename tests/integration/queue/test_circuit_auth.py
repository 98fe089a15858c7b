"""Circuits after failed authentications: probes have a separate, longer backoff."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from outbox_server.shared.queue.circuits import Circuit
from outbox_server.shared.queue.connection import connect, open_queues
from outbox_server.shared.queue.records import Claim, Contact, LimitUse
from tests.dispatchers import options, settings_of
from tests.integration.queue.shard import AUTH_BACKOFF, BACKOFF, SENDER, START_MS, Shard, jobs

FREE = replace(SENDER, gap=timedelta(0), jobs=jobs(*((n, 0) for n in range(1, 10))))
AUTH_MS = [wait // timedelta(milliseconds=1) for wait in AUTH_BACKOFF]
MS = [wait // timedelta(milliseconds=1) for wait in BACKOFF]


async def fail(shard: Shard, claim: Claim, contact: Contact) -> None:
    await shard.settle(
        claim,
        LimitUse.BEGUN,
        contact=contact,
        connection_error="535 5.7.8 no",
        retry_at=shard.now + 1,
    )


async def outage(shard: Shard, *contacts: Contact) -> None:
    """Let that many sends fail, one after the other."""
    for contact in contacts:
        (claim,) = (await shard.claim(1)).claims
        await fail(shard, claim, contact)


async def test_probes_after_failed_authentications_back_off_up_to_the_last_wait(
    shard: Shard,
) -> None:
    await shard.load(FREE)
    await outage(shard, *[Contact.AUTH_FAILED] * 3)
    time = 0
    for wait in (*AUTH_MS, AUTH_MS[-1]):
        time += wait
        await shard.at(time - 1)
        assert await shard.claimed() == []
        await shard.at(time)
        (probe,) = (await shard.claim()).claims
        await fail(shard, probe, Contact.AUTH_FAILED)


async def test_the_reply_is_reported_as_the_reason_of_the_circuit(shard: Shard) -> None:
    await shard.load(FREE)
    await outage(shard, *[Contact.AUTH_FAILED] * 3)

    assert await shard.queue.circuits_of_sender(7) == (
        Circuit(7, START_MS, START_MS + AUTH_MS[0], "535 5.7.8 no"),
    )


async def test_each_failure_takes_its_step_from_its_own_backoff(shard: Shard) -> None:
    await shard.load(FREE)
    await outage(shard, Contact.AUTH_FAILED, Contact.AUTH_FAILED, Contact.FAILED)
    assert await shard.ready() == {7: MS[0]}
    await shard.at(MS[0])
    await outage(shard, Contact.AUTH_FAILED)
    assert await shard.ready() == {7: MS[0] + AUTH_MS[1]}
    await shard.at(MS[0] + AUTH_MS[1])
    await outage(shard, Contact.FAILED)

    assert await shard.ready() == {7: MS[0] + AUTH_MS[1] + MS[2]}


async def test_the_circuit_of_an_endpoint_follows_the_same_backoff(shard: Shard) -> None:
    heads = [
        replace(FREE, sender_id=n, jobs=jobs(*((n * 100 + i, 0) for i in range(5)))) for n in (1, 2)
    ]
    await shard.load(*heads)
    claims = (await shard.claim()).claims
    for claim in claims[3:6]:
        await fail(shard, claim, Contact.AUTH_FAILED)
    assert int((await shard.circuit())["next"]) == START_MS + AUTH_MS[0]
    for claim in (*claims[:3], *claims[6:]):
        await shard.settle(claim, LimitUse.UNUSED, retry_at=0, give_back=True)
    await shard.at(AUTH_MS[0])
    (probe,) = (await shard.claim()).claims
    await fail(shard, probe, Contact.AUTH_FAILED)

    assert int((await shard.circuit())["next"]) == START_MS + AUTH_MS[0] + AUTH_MS[1]


async def test_a_successful_authentication_closes_the_circuit(shard: Shard) -> None:
    await shard.load(FREE)
    await outage(shard, *[Contact.AUTH_FAILED] * 3)
    await shard.at(AUTH_MS[0])
    (probe,) = (await shard.claim()).claims
    await shard.settle(probe, contact=Contact.ACCEPTED)

    assert len(await shard.claimed()) == 5


@pytest.mark.parametrize(
    ("backoff", "expected"),
    [
        ("5s,25s,125s", (5, 25, 125, 250, 500, 1000, 2000, 3600)),
        ("1h", (3600,)),
        ("2h", (7200,)),
        ("0,40m", (2400, 3600)),
        ("", (5, 25, 125, 250, 500, 1000, 2000, 3600)),
        ("0", (5, 25, 125, 250, 500, 1000, 2000, 3600)),
    ],
)
async def test_the_backoff_after_failed_authentications_extends_the_retries_to_one_hour(
    backoff: str, expected: tuple[int, ...]
) -> None:
    values = options("postgresql://outbox@localhost/outbox", "redis://localhost", "smtp://x.test")
    settings = settings_of(values | {"retry_backoff": backoff})
    async with connect(settings) as redis:
        (queue,) = open_queues(redis, settings)

    assert queue._auth_backoff == tuple(timedelta(seconds=each) for each in expected)
