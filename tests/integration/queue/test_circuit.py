"""The circuits of includes/: mail to a failing endpoint waits while one probe at a time is sent."""

from __future__ import annotations

from dataclasses import replace

from outbox_server.shared.queue.circuits import Circuit, CircuitChange
from outbox_server.shared.queue.keys import JobRef
from outbox_server.shared.queue.records import Claim, Head, LimitUse
from tests.integration.queue.shard import LEASE_MS, SENDER, START_MS, Shard, jobs, milliseconds

RECHECK_MS = 30_000
# Only the circuit delays the sender: it has no gap, and one claim may take many jobs.
FREE = replace(SENDER, gap=milliseconds(0), max_in_flight=50)


def sender(number: int, n: int = 10, *, endpoint: str = "relay", due: int = 0) -> Head:
    """Return a sender whose jobs number * 100 + 1 and so on have been due since `due`."""
    numbers = [(number * 100 + i, due) for i in range(1, n + 1)]
    return replace(FREE, sender_id=number, jobs=jobs(*numbers), endpoint=endpoint)


async def fail(shard: Shard, claim: Claim, *, reason: str = "refused", wait: int = 600_000) -> None:
    """End a send whose connection failed; its job is due again after `wait` ms."""
    await shard.settle(
        claim, LimitUse.BEGUN, connection_error=reason, retry_at=round(shard.now + wait)
    )


async def answer(shard: Shard, claim: Claim) -> None:
    await shard.settle(claim, LimitUse.COUNTED, answered=True)


async def outage(shard: Shard, times: int = 3, *, want: int = 1) -> None:
    """Let that many sends fail, one after the other."""
    for _ in range(times):
        for claim in (await shard.claim(want)).claims:
            await fail(shard, claim)


async def stop(shard: Shard, *heads: Head, wait: int = 600_000) -> None:
    """Load senders of one endpoint, including 1 and 2; let 101, 102 and 201 fail."""
    await shard.load(*heads)
    claims = {claim.job.job_id: claim for claim in (await shard.claim()).claims}
    for job_id in (101, 102, 201):
        await fail(shard, claims.pop(job_id), wait=wait)
    for claim in claims.values():
        await shard.settle(claim, LimitUse.UNUSED, retry_at=0, give_back=True)
    # The next claim looks at them once more, and then they wait.
    await shard.at(1)
    assert await shard.claimed() == []


async def one_probe(shard: Shard) -> Claim:
    [claim] = (await shard.claim()).claims
    assert await shard.claimed() == []
    return claim


# One sender ----------------------------------------------------------------------------------


async def test_three_failures_in_a_row_stop_a_sender_and_its_probes_follow_the_backoff(
    shard: Shard,
) -> None:
    await shard.load(sender(7))
    await outage(shard)
    time = shard.now
    for job_id, wait in enumerate((5_000, 25_000, 125_000, 125_000), 704):
        await shard.at(time + wait - 1)
        assert await shard.claimed() == []
        time += wait
        await shard.at(time)
        probe = await one_probe(shard)
        assert probe.job == JobRef(job_id, 1)
        await fail(shard, probe)


async def test_an_answer_resets_the_count_of_failures(shard: Shard) -> None:
    await shard.load(sender(7))
    await outage(shard, 2)
    [claim] = (await shard.claim(1)).claims
    await shard.settle(claim, LimitUse.BEGUN, answered=True, retry_at=600_000)
    await outage(shard, 2)

    assert len((await shard.claim()).claims) == 5


async def test_outcomes_without_contact_do_not_change_the_count_of_failures(shard: Shard) -> None:
    await shard.load(sender(7))
    await outage(shard, 2)
    # One mail cannot be built, one is given back, and the dispatcher of one dies.
    built, back, _ = (await shard.claim(3)).claims
    await shard.settle(built, LimitUse.BEGUN)
    await shard.settle(back, LimitUse.UNUSED, retry_at=600_000, give_back=True)
    await shard.at(LEASE_MS)
    assert len((await shard.claim(1)).claims) == 1
    assert (await shard.sender()).settings["troubles"] == "2"


async def test_a_probe_that_is_answered_resumes_the_sender_at_once(shard: Shard) -> None:
    await shard.load(sender(7))
    await outage(shard)
    await shard.at(5_000)
    [probe] = (await shard.claim()).claims
    await answer(shard, probe)

    assert len((await shard.claim()).claims) == 6
    assert "troubles" not in (await shard.sender()).settings


async def test_sends_begun_before_a_circuit_opened_do_not_advance_the_backoff(
    shard: Shard,
) -> None:
    await shard.load(sender(7))
    for claim in (await shard.claim(8)).claims:
        await fail(shard, claim)

    assert await shard.ready() == {7: 5_000}


async def test_a_sender_whose_endpoint_changed_is_tried_at_once(shard: Shard) -> None:
    await shard.load(sender(7))
    await outage(shard)
    await shard.load(replace(sender(7), jobs=jobs((709, 0)), revision=1))
    assert await shard.claimed() == []

    await shard.load(replace(sender(7), jobs=jobs((709, 0)), revision=2))
    assert await shard.claimed() == [709]


async def test_failures_of_one_sender_stop_no_other_sender_of_its_endpoint(shard: Shard) -> None:
    await shard.load(sender(1))
    await outage(shard, 20)
    await shard.load(sender(2))

    assert len(await shard.claimed()) == 10
    assert await shard.circuit() != {}
    assert "open" not in await shard.circuit()


# An endpoint ---------------------------------------------------------------------------------


async def test_failures_of_several_senders_stop_their_endpoint_and_no_other(shard: Shard) -> None:
    await stop(shard, sender(1), sender(2), sender(3))
    await shard.load(sender(4, endpoint="other"))

    assert await shard.claimed() == list(range(401, 411))
    assert await shard.waiters() == {1: 0, 2: 0, 3: 0}


async def test_one_probe_at_a_time_over_all_senders_of_an_endpoint(shard: Shard) -> None:
    await stop(shard, sender(1, 5), sender(2, 5), sender(3, 5))
    time = 0
    tried: list[JobRef] = []
    for wait in (5_000, 25_000, 125_000, 125_000):
        for early in (wait // 2, wait - 1):
            await shard.at(time + early)
            assert await shard.claimed() == []
        time += wait
        await shard.at(time)
        probe = await one_probe(shard)
        tried.append(probe.job)
        await fail(shard, probe)

    assert len(set(tried)) == 4


async def test_an_answer_resumes_all_senders_of_the_endpoint_within_their_limits(
    shard: Shard,
) -> None:
    slow = replace(sender(3, 5), gap=milliseconds(2_000))
    await stop(shard, sender(1, 5), sender(2, 5), slow)
    await shard.at(5_000)
    await answer(shard, await one_probe(shard))

    assert sorted(await shard.claimed()) == [104, 105, 202, 203, 204, 205, 301]
    assert await shard.circuit() == {}
    assert await shard.waiters() == {}


async def test_a_job_that_was_never_tried_probes_before_one_that_failed(shard: Shard) -> None:
    # The failed jobs are due again long before the next probe.
    await stop(shard, sender(1, 2), sender(2, 1), sender(3, 3), wait=2)
    tried: list[JobRef] = []
    for time in (5_000, 30_000, 155_000, 280_000, 405_000):
        await shard.at(time - 100)
        assert await shard.claimed() == []
        await shard.at(time)
        probe = await one_probe(shard)
        tried.append(probe.job)
        await fail(shard, probe, wait=1)

    assert sorted(tried) == [
        *(JobRef(n, 2) for n in (101, 102)),
        *(JobRef(n, 1) for n in (301, 302, 303)),
    ]


async def test_when_a_prober_dies_another_probes_after_its_lease_expired(shard: Shard) -> None:
    await stop(shard, sender(1, 5), sender(2, 5), sender(3, 5))
    await shard.at(5_000)
    [dead] = (await shard.claim()).claims
    await shard.at(5_000 + LEASE_MS - 1)
    assert await shard.claimed() == []
    await shard.at(5_000 + LEASE_MS)
    [probe] = (await shard.claim()).claims

    assert probe.job != dead.job
    # The paused dispatcher resumes: its result is ignored, because its job is no longer the probe.
    await fail(shard, dead)
    assert (await shard.circuit())["step"] == "1"
    await fail(shard, probe)
    assert (await shard.circuit())["step"] == "2"


async def test_a_probe_that_was_not_sent_makes_room_for_another_at_once(shard: Shard) -> None:
    await stop(shard, sender(1, 5), sender(2, 5), sender(3, 5))
    await shard.at(5_000)
    [cancelled] = (await shard.claim()).claims
    await shard.settle(cancelled, LimitUse.UNUSED)

    [probe] = (await shard.claim()).claims
    assert probe.job != cancelled.job


async def test_when_the_next_prober_is_paused_another_sender_probes(shard: Shard) -> None:
    heads = {number: sender(number, 5) for number in (1, 2, 3)}
    await stop(shard, *heads.values())
    [first] = [number for number, look in (await shard.ready()).items() if look == 5_000]
    await shard.load(replace(heads[first], active=False))
    await shard.at(5_000)

    [probe] = (await shard.claim()).claims
    assert probe.sender_id != first


async def test_the_first_failing_sender_waits_for_the_endpoint_once_another_fails(
    shard: Shard,
) -> None:
    await shard.load(sender(1))
    await outage(shard)
    await shard.at(5_000)
    await outage(shard, 1)
    # Its next probe is due at 30 s; now a second sender fails.
    await shard.load(sender(2))
    await outage(shard, 1)

    assert await shard.queue.circuits_of_sender(1) == (
        Circuit(None, START_MS + 5_000, START_MS + 10_000, "refused"),
    )
    await shard.at(10_000)
    [probe] = (await shard.claim()).claims
    await answer(shard, probe)
    assert {claim.sender_id for claim in (await shard.claim()).claims} == {1, 2}


async def test_a_sender_that_changes_its_endpoint_no_longer_waits(shard: Shard) -> None:
    await stop(shard, sender(1, 5), sender(2, 5), sender(3, 5))
    await shard.load(replace(sender(3, 5, endpoint="other"), revision=2))

    assert await shard.claimed() == [301, 302, 303, 304, 305]
    assert 3 not in await shard.waiters()


async def test_losing_the_keys_of_a_circuit_strands_no_sender(shard: Shard) -> None:
    await stop(shard, sender(1, 5), sender(2, 5), sender(3, 5))
    await shard.redis.delete(f"{shard.prefix}circuit:relay", f"{shard.prefix}waiters:relay")
    await shard.at(1 + RECHECK_MS)

    assert len(await shard.claimed()) == 12


async def test_a_recovery_releases_at_once_the_waiters_of_a_lost_circuit(
    shard: Shard,
) -> None:
    await stop(shard, sender(1, 5), sender(2, 5), sender(3, 5))
    await shard.redis.delete(f"{shard.prefix}circuit:relay")
    assert await shard.claimed() == []
    assert await shard.queue.find_lost([1, 2, 3]) == []

    assert await shard.claimed() == [103, 104, 105, 202, 203, 204, 205, 301, 302, 303, 304, 305]


async def test_a_sender_that_changed_its_endpoint_while_a_circuit_was_lost_does_not_wait(
    shard: Shard,
) -> None:
    heads = [sender(number, 5) for number in (1, 2, 3)]
    await stop(shard, *heads)
    await shard.redis.delete(f"{shard.prefix}circuit:relay")
    await shard.load(replace(heads[2], endpoint="other", jobs=()))
    await stop(shard, *heads[:2])

    assert await shard.waiters() == {1: 0, 2: 0}


async def test_no_circuit_survives_a_restart_of_redis(shard: Shard) -> None:
    heads = [sender(number, 5) for number in (1, 2, 3)]
    await stop(shard, *heads)
    # Redis restarts with the data on its disk; its clock may differ now.
    await shard.redis.set(f"{shard.prefix}test:run", "second")
    assert await shard.queue.circuits_of_sender(3) == ()
    await shard.whole()
    await shard.load(*heads)

    assert len(await shard.claimed()) == 15


async def test_an_unused_claim_does_not_end_a_later_probe_of_the_same_attempt(
    shard: Shard,
) -> None:
    heads = sender(1, 2), sender(2, 1)
    await stop(shard, *heads)
    await shard.load(replace(heads[0], jobs=jobs((103, 0))))
    await shard.at(5_000)
    lost = await one_probe(shard)
    # Its lease expires before it is marked, and the job is claimed again.
    await shard.at(5_000 + LEASE_MS)
    await shard.claim()
    await shard.load(replace(heads[0], jobs=jobs((103, 0))))
    probe = await one_probe(shard)
    assert probe.job == lost.job
    await shard.settle(lost, LimitUse.UNUSED)

    await fail(shard, probe)
    assert (await shard.circuit())["step"] == "2"


async def test_the_keys_of_a_circuit_expire(shard: Shard) -> None:
    await stop(shard, sender(1, 5), sender(2, 5))

    for key in ("circuit:relay", "waiters:relay"):
        assert 3_600_000 < await shard.redis.pttl(shard.prefix + key) <= 3_605_000


# Reported changes --------------------------------------------------------------------------------


async def test_the_circuits_that_a_sender_waits_for_are_reported(shard: Shard) -> None:
    await shard.load(sender(1, 5), sender(2, 5), sender(3, 5, endpoint="other"))
    assert await shard.queue.circuits_of_sender(1) == ()
    await shard.at(40)
    claims = {claim.job.job_id: claim for claim in (await shard.claim()).claims}
    for job_id in (101, 102, 201):
        await fail(shard, claims[job_id], reason="x" * 500)
    for job_id in (301, 302, 303):
        await fail(shard, claims[job_id], reason="535 5.7.8 no")

    of_endpoint = Circuit(None, START_MS + 40, START_MS + 5_040, "x" * 200)
    of_sender = Circuit(3, START_MS + 40, START_MS + 5_040, "535 5.7.8 no")
    assert await shard.queue.circuits_of_sender(1) == (of_endpoint,)
    assert await shard.queue.circuits_of_sender(2) == (of_endpoint,)
    assert await shard.queue.circuits_of_sender(3) == (of_sender,)
    assert await shard.queue.circuits_of_sender(4) == ()
    # If all failures of an endpoint belong to one sender, the sender's circuit is shown.
    reported = await shard.queue.circuits_of_endpoints(["relay", "other", "third"])
    assert reported == {"relay": of_endpoint, "other": of_sender}


def change(sender_id: int | None, since: int, server: str, *, opened: bool) -> CircuitChange:
    return CircuitChange(opened, sender_id, START_MS + since, "refused", server)


async def test_the_opening_and_closing_of_a_circuit_are_reported_once(shard: Shard) -> None:
    await shard.load(sender(1))
    await outage(shard, 2)
    assert shard.changes == []
    await outage(shard, 1)
    opened = change(1, 0, "mail.example:1", opened=True)
    assert shard.changes == [opened]
    await shard.at(5_000)
    await outage(shard, 1)
    assert shard.changes == [opened]

    # Another sender fails too, so the cause is the endpoint and not the first sender.
    await shard.load(sender(2))
    await outage(shard, 1)
    of_endpoint = [
        change(None, 5_000, "mail.example:2", opened=True),
        change(1, 0, "mail.example:2", opened=False),
    ]
    assert shard.changes == [opened, *of_endpoint]
    await shard.at(10_000)
    probe = await one_probe(shard)
    await answer(shard, probe)
    answered = change(None, 5_000, f"mail.example:{probe.sender_id}", opened=False)
    assert shard.changes == [opened, *of_endpoint, answered]
    await answer(shard, (await shard.claim(1)).claims[0])
    assert shard.changes == [opened, *of_endpoint, answered]


async def test_a_circuit_closed_by_a_change_of_its_sender_is_reported(shard: Shard) -> None:
    await shard.load(sender(7))
    await outage(shard)
    await shard.load(replace(sender(7), revision=2))

    assert shard.changes == [
        change(7, 0, "mail.example:7", opened=True),
        change(7, 0, "", opened=False),
    ]
