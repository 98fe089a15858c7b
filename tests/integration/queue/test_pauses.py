"""Pauses that end by themselves: of a sender a limit, of a batch a time at which to load."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from tests.integration.queue.shard import SENDER, START_MS, Shard, jobs, milliseconds

HEAD = replace(SENDER, gap=timedelta(0), jobs=jobs((1, 0), (2, 0)))
ID = SENDER.sender_id


async def test_a_paused_sender_sends_from_the_end_of_its_pause_on(shard: Shard) -> None:
    await shard.load(replace(HEAD, paused_until_ms=START_MS + 5_000))
    found = await shard.claim()
    assert (found.claims, found.loads) == ((), ())
    assert found.next_look == milliseconds(5_000)
    await shard.at(4_999)
    assert await shard.claimed() == []
    await shard.at(5_010)
    claims = (await shard.claim()).claims
    assert [claim.job.job_id for claim in claims] == [1, 2]
    # The pause delayed them; the dispatcher is late by 10 ms.
    assert {claim.delayed_by for claim in claims} == {"SENDER_PAUSED"}
    assert {claim.waited for claim in claims} == {milliseconds(10)}


async def test_a_pause_that_has_ended_delays_nothing(shard: Shard) -> None:
    await shard.load(replace(HEAD, paused_until_ms=START_MS - 5_000))
    assert await shard.claimed() == [1, 2]


async def test_a_sender_is_loaded_when_the_pause_of_a_batch_ends(shard: Shard) -> None:
    # All of its mail is of paused batches.
    empty = replace(HEAD, jobs=(), wake=milliseconds(3_000))
    await shard.load(empty)
    found = await shard.claim()
    assert (found.claims, found.loads, found.next_look) == ((), (), milliseconds(3_000))
    assert await shard.queue.find_lost([ID], whole=True) == []
    await shard.at(3_000)
    assert (await shard.claim()).loads == (ID,)
    # The load is under way: nobody else asks for it at once, and the dispatcher sleeps.
    again = await shard.claim()
    assert again.loads == ()
    assert again.next_look is not None
    assert again.next_look > timedelta(0)
    await shard.load(HEAD)
    assert await shard.claimed() == [1, 2]
    assert (await shard.claim()).loads == ()


async def test_mail_is_sent_while_a_batch_of_the_sender_is_paused(shard: Shard) -> None:
    await shard.load(replace(HEAD, wake=milliseconds(3_000)))
    assert await shard.claimed() == [1, 2]
