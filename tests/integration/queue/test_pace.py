"""includes/pace.lua: the gap learned from replies that mail comes too fast."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from outbox_server.shared.queue.records import Claim, Contact, Head, LimitUse
from tests.integration.queue.shard import SENDER, WINDOW_MS, Shard, connect_to, jobs, milliseconds

FREE = replace(SENDER, gap=timedelta(0), jobs=jobs(*((n, 0) for n in range(1, 10))))
MOST_MS = 60_000
IDLE_MARGIN_MS = 60_000


async def claim_one(shard: Shard) -> Claim:
    (claim,) = (await shard.claim()).claims
    return claim


async def too_fast(shard: Shard, claim: Claim) -> None:
    """End a send that the server refused as too fast; its job waits again."""
    await shard.settle(claim, LimitUse.BEGUN, contact=Contact.TOO_FAST, retry_at=shard.now)


async def pace(shard: Shard) -> int:
    """Return the pace of the sender in ms, or 0 if it has none."""
    return int((await shard.sender()).settings.get("pace", 0))


async def teach(shard: Shard, head: Head, times: int) -> None:
    """Load a sender and let its server reply "too fast" to each mail."""
    await shard.load(head)
    for _ in range(times):
        (claim,) = (await shard.claim(1)).claims
        await too_fast(shard, claim)
        await shard.at(shard.now + max(await pace(shard), head.gap // milliseconds(1)))


async def test_each_reply_doubles_the_gap_up_to_a_minute(shard: Shard) -> None:
    await shard.load(FREE)
    expected = [125 * 2**n for n in range(9)] + [MOST_MS, MOST_MS]
    time = 0
    for gap in expected:
        await too_fast(shard, (await shard.claim(1)).claims[0])
        assert await pace(shard) == gap
        time += gap
        await shard.at(time - 1)
        assert await shard.claimed() == []
        await shard.at(time)


async def test_the_pace_doubles_the_gap_of_the_sender(shard: Shard) -> None:
    await teach(shard, replace(FREE, gap=milliseconds(2_000)), 2)

    assert await pace(shard) == 8_000


async def test_a_gap_over_a_minute_is_not_changed(shard: Shard) -> None:
    await teach(shard, replace(FREE, gap=milliseconds(90_000)), 1)
    await shard.at(89_999)
    assert await shard.claimed() == []

    await shard.at(90_000)
    assert len(await shard.claimed()) == 1


@pytest.mark.parametrize(
    ("gap", "expected"),
    [(0, [112, 100, 90, 81, 72, 64]), (2_000, [3_600, 3_240, 2_916, 2_624, 2_361, 2_124])],
)
async def test_accepted_mails_shrink_the_pace_until_the_senders_own_gap_holds_again(
    shard: Shard, gap: int, expected: list[int]
) -> None:
    await teach(shard, replace(FREE, gap=milliseconds(gap)), 1)
    for left in [*expected, 0]:
        await shard.settle(await claim_one(shard), contact=Contact.ACCEPTED)
        assert await pace(shard) == left
        await shard.at(shard.now + max(left, gap))

    assert len(await shard.claimed()) == (2 if gap == 0 else 1)


@pytest.mark.parametrize("contact", [Contact.NONE, Contact.ANSWERED, Contact.FAILED])
async def test_replies_unrelated_to_the_pace_do_not_change_it(
    shard: Shard, contact: Contact
) -> None:
    await teach(shard, FREE, 2)
    await shard.settle(await claim_one(shard), LimitUse.BEGUN, contact=contact)

    assert await pace(shard) == 250


async def test_with_a_pace_one_send_is_in_flight(shard: Shard) -> None:
    await teach(shard, FREE, 1)
    assert len(await shard.claimed()) == 1
    await shard.at(10_000)

    assert await shard.claimed() == []


async def test_a_refusal_of_a_mail_sent_before_the_pace_does_not_raise_it(shard: Shard) -> None:
    await shard.load(FREE)
    first, *others, last = (await shard.claim()).claims
    await too_fast(shard, first)
    for claim in others:
        await too_fast(shard, claim)
    assert await pace(shard) == 125
    # The pace applies once the last of them has ended.
    await too_fast(shard, last)
    assert await pace(shard) == 250


async def test_a_mail_accepted_before_the_pace_does_not_shrink_it(shard: Shard) -> None:
    await shard.load(FREE)
    first, *others, _ = (await shard.claim()).claims
    await too_fast(shard, first)
    for claim in others:
        await shard.settle(claim, contact=Contact.ACCEPTED)

    assert await pace(shard) == 125


@pytest.mark.parametrize(
    ("change", "left"),
    [({"revision": 2}, 0), ({"endpoint": "other"}, 0), ({"hourly_limit": 50}, 250)],
)
async def test_a_load_resets_the_pace_only_if_the_sender_changed(
    shard: Shard, change: dict[str, int | str], left: int
) -> None:
    await teach(shard, FREE, 2)
    changed: Head = replace(FREE, **change)  # type: ignore[arg-type]
    await shard.load(changed, committed=True)

    assert await pace(shard) == left


async def test_the_limiter_reports_the_pace_as_the_gap(shard: Shard) -> None:
    await shard.load(FREE)
    await too_fast(shard, (await shard.claim(1)).claims[0])
    await shard.at(25)
    found = await shard.queue.read_limiter(7)

    assert found is not None
    assert found.gap_left == milliseconds(100)


async def test_a_pace_longer_than_the_window_keeps_the_promise_of_the_window(
    redis_url: str,
) -> None:
    async with connect_to(redis_url) as client:
        shard = Shard(client, window=milliseconds(10_000))
        await shard.at(0)
        await shard.whole()
        head = replace(FREE, hourly_limit=2)
        await teach(shard, head, 11)
        assert await pace(shard) == MOST_MS
        sent = shard.now
        await shard.settle(await claim_one(shard), contact=Contact.ACCEPTED)
        # The pace is forgotten, but the end of that send is still in the window.
        await shard.load(replace(head, revision=2), committed=True)
        await shard.at(sent + 1)
        assert len(await shard.claimed()) == 1
        await shard.at(sent + 9_999)
        assert await shard.claimed() == []
        await shard.at(sent + 10_000)
        assert len(await shard.claimed()) == 1


async def test_a_sender_with_a_pace_is_deleted_when_no_mail_waits(redis_url: str) -> None:
    async with connect_to(redis_url) as client:
        shard = Shard(client, window=milliseconds(10_000))
        await shard.at(0)
        await shard.whole()
        await teach(shard, FREE, 11)
        await shard.load(replace(FREE, jobs=()), committed=True)

        assert (await shard.sender()).settings_expire
        left = await client.pttl(f"{shard.prefix}sender:7")
        # No earlier than its current gap allows.
        assert MOST_MS < left <= MOST_MS + IDLE_MARGIN_MS


async def test_a_sender_with_a_pace_is_kept_while_a_mail_waits(shard: Shard) -> None:
    head = replace(FREE, jobs=jobs((1, 0)))
    await shard.load(head)
    await too_fast(shard, await claim_one(shard))

    assert not (await shard.sender()).settings_expire
    assert await shard.ready() == {7: 125}
    await shard.at(WINDOW_MS * 2)
    assert await shard.claimed() == [1]
