"""HoldService: what operators see and decide while the installation is held."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

from outbox.v1 import email_job_service_pb2
from outbox.v1.hold_pb2 import (
    HELD_AGE_DUE_LATER,
    HELD_AGE_DUE_WITHIN_DAY,
    HELD_AGE_DUE_WITHIN_HOUR,
    HELD_AGE_OVERDUE,
    HELD_AGE_OVERDUE_DAYS,
    HELD_AGE_OVERDUE_HOURS,
    HELD_STATE_SENDING,
    HELD_STATE_WAITING,
    HOLD_REASON_REQUESTED,
    HeldFilter,
    Hold,
)
from outbox.v1.hold_service_pb2 import (
    BeginHoldRequest,
    CancelHeldJobsRequest,
    GetHoldRequest,
    ReleaseHeldJobsRequest,
)
from outbox.v1.sender_pb2 import Sender

from outbox_server.shared.states import JobState
from tests.scheduler_stack import Scheduler, refusal_of

HOUR = timedelta(hours=1)


async def begin(scheduler: Scheduler) -> Hold:
    return await scheduler.holds.BeginHold(BeginHoldRequest())


async def read(scheduler: Scheduler, **which: Any) -> Hold:
    return await scheduler.holds.GetHold(GetHoldRequest(filter=HeldFilter(**which)))


async def batch(scheduler: Scheduler, sender: Sender, rows: int = 1) -> str:
    """Accept a batch of mails that are due now; return its id."""
    csv = "email\n" + "".join(f"r{n}@y.org\n" for n in range(rows))
    return (await scheduler.schedule(sender, csv)).batch.batch_id


def shift(scheduler: Scheduler, batch_id: str, by: timedelta) -> None:
    """Move the due time of the jobs of a batch."""
    scheduler.execute(
        "UPDATE email_jobs SET scheduled_at = scheduled_at + %s WHERE batch_id = %s",
        by,
        int(batch_id),
    )


def ages(hold: Hold) -> dict[tuple[int, int], int]:
    return {(group.state, group.age): group.job_count for group in hold.groups}


async def test_what_is_held_is_shown_by_state_age_and_sender(scheduler: Scheduler) -> None:
    assert await read(scheduler) == Hold()
    ann, bob = await scheduler.sender("ann"), await scheduler.sender("bob")
    batches = {
        age: await batch(scheduler, ann, age)
        for age in (
            *(HELD_AGE_OVERDUE_DAYS, HELD_AGE_OVERDUE_HOURS, HELD_AGE_OVERDUE),
            *(HELD_AGE_DUE_WITHIN_HOUR, HELD_AGE_DUE_WITHIN_DAY, HELD_AGE_DUE_LATER),
        )
    }
    hours = (-25, -2, 0, 0.5, 2, 25)
    for batch_id, away in zip(batches.values(), hours, strict=True):
        shift(scheduler, batch_id, away * HOUR)
    sending = await batch(scheduler, bob)
    scheduler.execute(
        "UPDATE email_jobs SET state = 2, attempt = 1, lease_until = now() + interval '1 minute'"
        " WHERE batch_id = %s",
        int(sending),
    )
    hold = await begin(scheduler)
    assert (hold.held, hold.reason) == (True, HOLD_REASON_REQUESTED)
    assert ages(hold) == {
        (HELD_STATE_SENDING, HELD_AGE_OVERDUE): 1,
        **{(HELD_STATE_WAITING, age): int(age) for age in batches},
    }
    assert (hold.job_count, hold.sender_count) == (22, 2)
    assert [(each.user_id, each.job_count) for each in hold.senders] == [("ann", 21), ("bob", 1)]
    assert (hold.senders[0].overdue_count, hold.senders[0].sending_count) == (6, 0)
    assert (hold.senders[1].overdue_count, hold.senders[1].sending_count) == (0, 1)

    # All filters, and two at once.
    for which, jobs in (
        ({"user_id": "bob"}, 1),
        ({"sender_id": ann.sender_id}, 21),
        ({"batch_id": batches[HELD_AGE_DUE_LATER]}, 6),
        ({"state": HELD_STATE_SENDING}, 1),
        ({"state": HELD_STATE_WAITING}, 21),
        ({"due_start_time": hold.start_time}, 15),
        ({"due_end_time": hold.start_time, "user_id": "ann"}, 6),
        ({"user_id": "nobody"}, 0),
    ):
        assert (await read(scheduler, **which)).job_count == jobs, which
    # A second hold changes nothing.
    assert (await begin(scheduler)).start_time == hold.start_time


async def test_a_release_stays_in_force_and_the_hold_ends_with_the_last_held_job(
    scheduler: Scheduler,
) -> None:
    ann, bob = await scheduler.sender("ann"), await scheduler.sender("bob")
    await batch(scheduler, ann, 3)
    await batch(scheduler, bob, 2)
    await begin(scheduler)
    release = ReleaseHeldJobsRequest(filter=HeldFilter(user_id="ann"))
    answer = await scheduler.holds.ReleaseHeldJobs(release)
    assert (answer.released_count, answer.hold_ended) == (3, False)
    answer = await scheduler.holds.ReleaseHeldJobs(release)
    assert (answer.released_count, answer.hold_ended) == (0, False)
    await batch(scheduler, ann)
    await batch(scheduler, bob)
    hold = await read(scheduler)
    assert [(each.user_id, each.job_count) for each in hold.senders] == [("bob", 3)]
    assert list(hold.releases) == [release.filter]
    last = ReleaseHeldJobsRequest(filter=HeldFilter(sender_id=bob.sender_id), request_id="once")
    answers = await asyncio.gather(*(scheduler.holds.ReleaseHeldJobs(last) for _ in range(4)))
    assert {(each.released_count, each.hold_ended) for each in answers} == {(3, True)}
    assert await read(scheduler) == Hold()
    assert scheduler.value("SELECT count(*) FROM hold_releases") == 0


async def test_what_is_cancelled_is_cancelled_and_what_is_released_is_not(
    scheduler: Scheduler,
) -> None:
    ann, bob = await scheduler.sender("ann"), await scheduler.sender("bob")
    await batch(scheduler, ann, 3)
    await batch(scheduler, bob, 2)
    cancel = CancelHeldJobsRequest(all=True, request_id="once", reason="too early")
    refusal = await refusal_of(scheduler.holds.CancelHeldJobs(cancel))
    assert refusal.reason == "NOT_HELD"
    await begin(scheduler)
    released = ReleaseHeldJobsRequest(filter=HeldFilter(user_id="ann"))
    await scheduler.holds.ReleaseHeldJobs(released)
    # What was refused has left its id free.
    cancel.reason = "now"
    answers = await asyncio.gather(*(scheduler.holds.CancelHeldJobs(cancel) for _ in range(4)))
    assert len({each.SerializeToString() for each in answers}) == 1
    answer = answers[0]
    assert (answer.cancelled_count, answer.more, answer.hold_ended) == (2, False, True)
    states = scheduler.rows(
        "SELECT user_id, j.state, count(*) FROM email_jobs j JOIN senders s ON s.id = sender_id"
        " GROUP BY 1, 2 ORDER BY 1"
    )
    assert states == [("ann", JobState.SCHEDULED, 3), ("bob", JobState.CANCELLED, 2)]


async def test_a_job_in_sending_is_cancelled_once_its_lease_has_expired(
    scheduler: Scheduler,
) -> None:
    await batch(scheduler, await scheduler.sender("ann"))
    scheduler.execute("UPDATE email_jobs SET state = 2, attempt = 1, lease_until = now()")
    await begin(scheduler)
    cancel = CancelHeldJobsRequest(filter=HeldFilter(state=HELD_STATE_SENDING))
    answer = await scheduler.holds.CancelHeldJobs(cancel)
    assert (answer.cancelled_count, answer.sending_count, answer.hold_ended) == (0, 1, False)
    # A dispatcher ends the attempt.
    scheduler.execute("UPDATE email_jobs SET state = 1, lease_until = NULL")
    answer = await scheduler.holds.CancelHeldJobs(cancel)
    assert (answer.cancelled_count, answer.sending_count, answer.hold_ended) == (1, 0, True)


async def test_a_held_job_is_explained_and_not_forecast(scheduler: Scheduler) -> None:
    accepted = await scheduler.schedule(await scheduler.sender("ann"))
    await begin(scheduler)
    job = scheduler.value("SELECT id FROM email_jobs WHERE batch_id = %s", accepted.batch.batch_id)
    why = await scheduler.jobs.ExplainEmailJob(
        email_job_service_pb2.ExplainEmailJobRequest(email_job_id=str(job))
    )
    assert why.wait_reason == email_job_service_pb2.WAIT_REASON_HELD
    assert not why.HasField("estimated_send_time")
    assert "held" in why.explanation


async def test_wrong_requests_name_the_field_and_release_nothing(scheduler: Scheduler) -> None:
    hold = scheduler.holds
    everything = ReleaseHeldJobsRequest(all=True)
    refusal = await refusal_of(hold.ReleaseHeldJobs(everything))
    assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "NOT_HELD")
    refusal = await refusal_of(hold.CancelHeldJobs(CancelHeldJobsRequest(all=True)))
    assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "NOT_HELD")
    await batch(scheduler, await scheduler.sender("ann"))
    now = (await begin(scheduler)).start_time
    for which, everything_too, reason, field in (
        (HeldFilter(), False, "FILTER_REQUIRED", "filter"),
        (HeldFilter(user_id="ann"), True, "HELD_FILTER_INVALID", "all"),
        (HeldFilter(state=9), False, "HELD_FILTER_INVALID", "filter.state"),  # type: ignore[arg-type]
        (
            HeldFilter(due_start_time=now, due_end_time=now),
            False,
            "HELD_FILTER_INVALID",
            "filter.due_end_time",
        ),
        (HeldFilter(user_id="a" * 129), False, "USER_ID_INVALID", "filter.user_id"),
    ):
        for call in (
            hold.ReleaseHeldJobs(ReleaseHeldJobsRequest(filter=which, all=everything_too)),
            hold.CancelHeldJobs(CancelHeldJobsRequest(filter=which, all=everything_too)),
        ):
            refusal = await refusal_of(call)
            assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", reason)
            assert list(refusal.violations) == [field]
    refusal = await refusal_of(
        hold.ReleaseHeldJobs(ReleaseHeldJobsRequest(filter=HeldFilter(sender_id="x")))
    )
    assert refusal.reason == "SENDER_NOT_FOUND"
    scheduler.execute("INSERT INTO hold_releases (sender_id) SELECT -generate_series(1, 1000)")
    refusal = await refusal_of(
        hold.ReleaseHeldJobs(ReleaseHeldJobsRequest(filter=HeldFilter(user_id="bob")))
    )
    assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "TOO_MANY_RELEASES")
    assert (await read(scheduler)).job_count == 1
    # Everything can be released all the same.
    assert (await hold.ReleaseHeldJobs(everything)).hold_ended
