"""Quotas of users: exact also when calls come at once, and changed by operators."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import grpc
from outbox.v1.batch_service_pb2 import (
    ScheduleBatchRequest,
    UploadBatchRequest,
    WatchBatchRequest,
)
from outbox.v1.email_job_service_pb2 import (
    UNCERTAIN_RESOLUTION_RESEND,
    ResolveEmailJobRequest,
    RetryEmailJobsRequest,
)
from outbox.v1.sender_pb2 import Sender
from outbox.v1.sender_service_pb2 import (
    CreateSenderRequest,
    DeleteSenderRequest,
    GetSenderRequest,
    UpdateSenderRequest,
)
from outbox.v1.user_pb2 import User, UserQuotas
from outbox.v1.user_service_pb2 import GetUserRequest, ListUsersRequest, UpdateUserRequest

from outbox_server.shared.database.engine import create_engine
from outbox_server.shared.retention.storage import remove_batches
from outbox_server.shared.settings import load_settings
from outbox_server.shared.states import JobState
from tests.eventually import eventually
from tests.fingerprint import Fingerprint
from tests.scheduler_stack import options_for, refusal_of, running_scheduler
from tests.two_users import Metadata, Rivals, give_up, refusals, rivals

ROWS = "email\n" + "".join(f"{n}@b.org\n" for n in range(3))


async def test_batches_at_once_never_exceed_the_quota_of_waiting_jobs(
    database_url: str, redis_url: str
) -> None:
    async with AsyncExitStack() as stack:
        schedulers = [
            await stack.enter_async_context(
                running_scheduler(database_url, redis_url, user_waiting_jobs=10)
            )
            for _ in range(2)
        ]
        senders = [await schedulers[0].sender() for _ in range(3)]
        other = await schedulers[0].sender("bob")
        answers = await asyncio.gather(
            *(schedulers[n % 2].schedule(senders[n % 3], ROWS) for n in range(12)),
            return_exceptions=True,
        )
        refused = [each for each in answers if isinstance(each, grpc.aio.AioRpcError)]
        assert len(answers) - len(refused) == 3
        one = schedulers[0]
        assert one.value("SELECT count(*) FROM email_jobs") == 9
        assert one.value("SELECT count(*) FROM batches") == 3
        before = await Fingerprint(one).take()
        refusal = await refusal_of(one.schedule(senders[0], ROWS))
        assert (refusal.code, refusal.reason) == (
            "RESOURCE_EXHAUSTED",
            "USER_WAITING_JOBS_EXCEEDED",
        )
        assert refusal.metadata == {"user": "ann", "limit": "10", "current": "9"}
        assert await Fingerprint(one).take() == before
        assert (await one.schedule(senders[0])).batch.accepted_count == 1
        # The quota limits this user only.
        assert (await one.schedule(other, ROWS)).batch.accepted_count == 3


async def test_an_upload_above_the_quota_is_refused_before_its_end(
    database_url: str, redis_url: str
) -> None:
    async with running_scheduler(database_url, redis_url, user_waiting_jobs=100) as scheduler:
        sender = await scheduler.sender()
        never = asyncio.Event()

        async def endless() -> AsyncIterator[UploadBatchRequest]:
            yield UploadBatchRequest(options=options_for(sender))
            yield UploadBatchRequest(chunk=b"email,note\n")
            for part in range(2):
                rows = (f"{part}-{n}@b.org,{'x' * 205}\n" for n in range(10_000))
                yield UploadBatchRequest(chunk="".join(rows).encode())
            await never.wait()

        refusal = await refusal_of(scheduler.batches.UploadBatch(endless()))
        assert refusal.reason == "USER_WAITING_JOBS_EXCEEDED"
        assert scheduler.value("SELECT count(*) FROM batches") == 0


async def test_the_same_request_again_is_answered_although_the_quota_is_reached(
    database_url: str, redis_url: str
) -> None:
    async with running_scheduler(database_url, redis_url, user_waiting_jobs=3) as scheduler:
        sender = await scheduler.sender()
        await scheduler.schedule(sender, ROWS, request_id="once")
        assert (await scheduler.schedule(sender, ROWS, request_id="once")).replayed


async def test_failed_and_uncertain_jobs_count_when_they_are_to_wait_again(
    database_url: str, redis_url: str
) -> None:
    async with running_scheduler(database_url, redis_url, user_waiting_jobs=3) as scheduler:
        sender = await scheduler.sender()
        for state in (JobState.FAILED, JobState.UNCERTAIN):
            await scheduler.schedule(sender, ROWS)
            scheduler.end_jobs(state)
        await scheduler.schedule(sender)
        retry = RetryEmailJobsRequest(sender_id=sender.sender_id)
        refusal = await refusal_of(scheduler.jobs.RetryEmailJobs(retry))
        assert refusal.reason == "USER_WAITING_JOBS_EXCEEDED"
        assert refusal.metadata["current"] == "1"
        uncertain = scheduler.rows("SELECT id FROM email_jobs WHERE state = 5 ORDER BY id")
        requests = [
            ResolveEmailJobRequest(email_job_id=str(job), resolution=UNCERTAIN_RESOLUTION_RESEND)
            for (job,) in uncertain
        ]
        for request in requests[:2]:
            await scheduler.jobs.ResolveEmailJob(request)
        refusal = await refusal_of(scheduler.jobs.ResolveEmailJob(requests[2]))
        assert refusal.reason == "USER_WAITING_JOBS_EXCEEDED"
        counts = dict(scheduler.rows("SELECT state, count(*) FROM email_jobs GROUP BY state"))
        assert counts == {JobState.SCHEDULED: 3, JobState.FAILED: 3, JobState.UNCERTAIN: 1}


async def test_senders_created_at_once_never_exceed_the_quota(
    database_url: str, redis_url: str
) -> None:
    async with AsyncExitStack() as stack:
        schedulers = [
            await stack.enter_async_context(
                running_scheduler(database_url, redis_url, user_senders=4)
            )
            for _ in range(2)
        ]
        answers = await asyncio.gather(
            *(schedulers[n % 2].sender() for n in range(20)), return_exceptions=True
        )
        made = [each for each in answers if isinstance(each, Sender)]
        assert len(made) == 4
        one = schedulers[0]
        refusal = await refusal_of(one.sender())
        assert refusal.reason == "USER_SENDERS_EXCEEDED"
        assert refusal.metadata == {"user": "ann", "limit": "4", "current": "4"}
        assert await one.sender("bob")
        await one.senders.DeleteSender(DeleteSenderRequest(sender_id=made[0].sender_id))
        assert await one.sender()


async def test_rejections_above_the_quota_are_counted_and_not_stored(
    database_url: str, redis_url: str
) -> None:
    async with running_scheduler(database_url, redis_url, user_stored_rejections=5) as scheduler:
        sender = await scheduler.sender()
        csv = "email\na@b.org\n" + "broken\n" * 3
        first, second, third = [await scheduler.schedule(sender, csv) for _ in range(3)]
        for answer in (first, second, third):
            assert (answer.batch.accepted_count, answer.batch.rejected_count) == (1, 3)
            assert len(answer.rejections) == 3
        assert not any("not stored" in notice for notice in first.notices)
        assert any(notice.startswith("1 rejections") for notice in second.notices)
        stored = "SELECT batch_id, row_number FROM batch_rejections ORDER BY 1, 2"
        ids = [int(each.batch.batch_id) for each in (first, second)]
        rows = [(ids[0], 2), (ids[0], 3), (ids[0], 4), (ids[1], 2), (ids[1], 3)]
        assert scheduler.rows(stored) == rows
        # Retention makes room again.
        for table in ("email_jobs", "count_deltas"):
            scheduler.execute(f"DELETE FROM {table}")
        scheduler.execute("UPDATE batches SET created_at = now() - interval '2 days'")
        engine = create_engine(load_settings(database_url=database_url))
        async with engine.begin() as connection:
            removed = await remove_batches(connection, timedelta(days=1), 0, 100)
        await engine.dispose()
        assert removed.rejections == 5
        assert scheduler.value("SELECT stored_rejections_count FROM users") == 0
        answer = await scheduler.schedule(sender, csv)
        assert not any("not stored" in notice for notice in answer.notices)


async def test_calls_uploads_and_watches_in_flight_have_quotas(
    database_url: str, redis_url: str
) -> None:
    async with rivals(database_url, redis_url, user_watches=2, user_uploads=2) as both:
        evil = await both.sender(both.eve)
        batch = await both.scheduler.batches.ScheduleBatch(request_of(evil), metadata=both.eve)
        watches = [watch(both, batch.batch.batch_id, both.eve) for _ in range(3)]
        uploads = [open_upload(both, evil, both.eve) for _ in range(3)]
        await eventually(
            lambda: refusals([each for each, _ in watches]) == {("USER_WATCHES_EXCEEDED", "eve"): 1}
        )
        await eventually(lambda: refusals(uploads) == {("USER_UPLOADS_EXCEEDED", "eve"): 1})
        await give_up([*uploads, *(each for each, _ in watches)])
        for _, stream in watches:
            stream.cancel()

        await both.set_quotas("eve", calls=0)
        get = GetSenderRequest(sender_id=evil.sender_id)

        async def refused() -> bool:
            try:
                await both.scheduler.senders.GetSender(get, metadata=both.eve)
            except grpc.aio.AioRpcError as error:
                return "USER_CALLS_EXCEEDED" in str(error.trailing_metadata())
            return False

        await eventually(refused)
        # The service acts for all users, and has no quota of one of them.
        await both.scheduler.senders.GetSender(get, metadata=both.service)


def request_of(sender: Sender) -> Any:
    return ScheduleBatchRequest(options=options_for(sender), csv=b"email\na@b.org\n")


def watch(both: Rivals, batch_id: str, key: Metadata) -> tuple[asyncio.Future[Any], Any]:
    stream = both.scheduler.batches.WatchBatch(WatchBatchRequest(batch_id=batch_id), metadata=key)
    return asyncio.ensure_future(stream.read()), stream


def open_upload(both: Rivals, sender: Sender, key: Metadata) -> asyncio.Future[Any]:
    async def messages() -> AsyncIterator[UploadBatchRequest]:
        yield UploadBatchRequest(options=options_for(sender))
        await asyncio.Event().wait()

    return asyncio.ensure_future(both.scheduler.batches.UploadBatch(messages(), metadata=key))


async def test_a_quota_below_the_use_refuses_new_things_and_keeps_the_old_ones(
    database_url: str, redis_url: str
) -> None:
    async with rivals(database_url, redis_url) as both:
        first, _ = await both.sender(both.eve), await both.sender(both.eve)
        await both.scheduler.batches.ScheduleBatch(request_of(first), metadata=both.eve)
        changed = await both.set_quotas("eve", senders=1, waiting_jobs=0)
        assert (changed.usage.sender_count, changed.usage.waiting_job_count) == (2, 1)
        refusal = await refusal_of(both.sender(both.eve))
        assert refusal.metadata == {"user": "eve", "limit": "1", "current": "2"}
        call = both.scheduler.batches.ScheduleBatch(request_of(first), metadata=both.eve)
        assert (await refusal_of(call)).reason == "USER_WAITING_JOBS_EXCEEDED"
        # For the service as well, when it acts for the user.
        call = both.scheduler.batches.ScheduleBatch(request_of(first), metadata=both.service)
        assert (await refusal_of(call)).reason == "USER_WAITING_JOBS_EXCEEDED"
        assert both.scheduler.value("SELECT count(*) FROM email_jobs WHERE state = 1") == 1
        request = GetSenderRequest(sender_id=first.sender_id)
        assert await both.scheduler.senders.GetSender(request, metadata=both.eve)
        await both.set_quotas("eve", senders=3)
        assert await both.sender(both.eve)


async def test_operators_read_and_change_users(database_url: str, redis_url: str) -> None:
    async with rivals(database_url, redis_url, user_senders=7) as both:
        users, key = both.users, both.operator
        found = await users.GetUser(GetUserRequest(user_id="ann"), metadata=key)
        assert not found.quotas.HasField("senders")
        assert found.effective_quotas.senders == 7
        assert not found.HasField("update_time")

        async def update(user: User, *paths: str) -> User:
            request = UpdateUserRequest(user=user)
            request.update_mask.paths.extend(paths)
            answer: User = await users.UpdateUser(request, metadata=key)
            return answer

        user = User(user_id="ann", sender_domains=["EXÄMPLE.com", "*.example.org"])
        user.quotas.senders = 2
        user.quotas.calls = 9
        user.quotas.unproven_endpoints = 3
        changed = await update(user)
        assert list(changed.sender_domains) == ["xn--exmple-cua.com", "*.example.org"]
        assert (changed.quotas.senders, changed.effective_quotas.senders) == (2, 2)
        assert found.effective_quotas.unproven_endpoints == 2
        assert changed.effective_quotas.unproven_endpoints == 3
        # Named in the mask and unset: the default again.
        changed = await update(User(user_id="ann"), "quotas.senders")
        assert not changed.quotas.HasField("senders")
        assert (changed.quotas.calls, changed.effective_quotas.senders) == (9, 7)
        assert len(changed.sender_domains) == 2
        changed = await update(User(user_id="ann"), "*")
        assert not changed.quotas.ListFields()
        assert not changed.sender_domains
        await both.set_quotas("bob", uploads=1)
        page = await users.ListUsers(ListUsersRequest(page_size=1), metadata=key)
        rest = await users.ListUsers(
            ListUsersRequest(page_token=page.next_page_token), metadata=key
        )
        assert [each.user_id for each in (*page.users, *rest.users)] == ["ann", "bob", "eve"]


@dataclass(frozen=True)
class WrongChange:
    user: User
    path: str
    reason: str
    field: str


WRONG_CHANGES = (
    WrongChange(User(), "*", "USER_ID_REQUIRED", "user.user_id"),
    WrongChange(User(user_id="x" * 129), "*", "USER_ID_INVALID", "user.user_id"),
    WrongChange(User(user_id="a"), "usage", "UPDATE_MASK_INVALID", "update_mask"),
    WrongChange(User(user_id="a"), "quotas.none", "UPDATE_MASK_INVALID", "update_mask"),
    WrongChange(
        User(user_id="a", sender_domains=["b.org", "nonsense"]),
        "sender_domains",
        "SENDER_DOMAIN_INVALID",
        "user.sender_domains[1]",
    ),
    WrongChange(
        User(user_id="a", sender_domains=[f"d{n}.org" for n in range(1_001)]),
        "sender_domains",
        "SENDER_DOMAIN_INVALID",
        "user.sender_domains",
    ),
)


async def test_invalid_changes_of_a_user_are_refused(database_url: str, redis_url: str) -> None:
    async with rivals(database_url, redis_url) as both:
        for wrong in WRONG_CHANGES:
            request = UpdateUserRequest(user=wrong.user)
            request.update_mask.paths.append(wrong.path)
            refusal = await refusal_of(both.users.UpdateUser(request, metadata=both.operator))
            assert (refusal.reason, list(refusal.violations)) == (wrong.reason, [wrong.field])
        for quotas in (UserQuotas(calls=-1), UserQuotas(unproven_endpoints=0)):
            request = UpdateUserRequest(user=User(user_id="ann", quotas=quotas))
            call = both.users.UpdateUser(request, metadata=both.operator)
            assert (await refusal_of(call)).reason == "QUOTA_INVALID"
        assert both.scheduler.value("SELECT count(*) FROM users") == 0


async def test_every_known_user_is_listed_once(database_url: str, redis_url: str) -> None:
    async with rivals(database_url, redis_url) as both:
        execute = both.scheduler.execute
        execute(
            "INSERT INTO senders (user_id, email, hourly_limit, deleted_at)"
            " SELECT 'sender-' || mod(n, 5), 's@x.org', 9, CASE mod(n, 5) WHEN 0 THEN now() END"
            " FROM generate_series(1, 500) AS n"
        )
        execute("INSERT INTO suppressions (user_id, address) VALUES ('dave', 'a@b.org')")
        await both.set_quotas("sender-3", calls=9)
        await both.set_quotas("zoe", calls=8)
        listed = {}
        request = ListUsersRequest(page_size=2)
        while True:
            page = await both.users.ListUsers(request, metadata=both.operator)
            assert len(page.users) <= 2
            for user in page.users:
                assert user.user_id not in listed
                listed[user.user_id] = user
            request.page_token = page.next_page_token
            if not request.page_token:
                break
        senders = [f"sender-{n}" for n in range(5)]
        # Ann and Eve have keys, Dave has a suppression.
        assert list(listed) == ["ann", "dave", "eve", *senders, "zoe"]
        assert listed["sender-3"].quotas.calls == 9
        assert listed["sender-3"].HasField("update_time")
        assert not listed["sender-4"].HasField("update_time")
        assert listed["sender-4"].effective_quotas.senders > 0


async def test_only_operators_may_use_the_service_of_users(
    database_url: str, redis_url: str
) -> None:
    async with rivals(database_url, redis_url) as both:
        for key in (both.eve, both.service):
            for call in (
                both.users.GetUser(GetUserRequest(user_id="eve"), metadata=key),
                both.users.ListUsers(ListUsersRequest(), metadata=key),
                both.users.UpdateUser(UpdateUserRequest(user=User(user_id="eve")), metadata=key),
            ):
                assert (await refusal_of(call)).reason == "OPERATOR_REQUIRED"


async def test_senders_need_an_assigned_domain_under_the_policy_of_domains(
    database_url: str, redis_url: str
) -> None:
    async with rivals(database_url, redis_url) as both:
        existing = await both.sender(both.eve, email="eve@bank.example.net")
    async with rivals(database_url, redis_url, sender_policy="domains") as both:
        batches, senders = both.scheduler.batches, both.scheduler.senders
        # A sender from before sends no new mail.
        call = batches.ScheduleBatch(request_of(existing), metadata=both.eve)
        refusal = await refusal_of(call)
        assert (refusal.code, refusal.reason) == ("PERMISSION_DENIED", "SENDER_DOMAIN_NOT_ALLOWED")
        assert refusal.metadata == {"user": "eve", "domain": "bank.example.net"}
        assert (await refusal_of(both.sender(both.eve))).reason == "SENDER_DOMAIN_NOT_ALLOWED"
        request = UpdateUserRequest(user=User(user_id="eve", sender_domains=["example.com"]))
        await both.users.UpdateUser(request, metadata=both.operator)
        made = await both.sender(both.eve, email="Eve@EXAMPLE.com")
        assert await batches.ScheduleBatch(request_of(made), metadata=both.eve)
        # The domain is assigned to Eve, and to nobody else.
        assert (await refusal_of(both.sender(both.ann))).reason == "SENDER_DOMAIN_NOT_ALLOWED"
        other = Sender(sender_id=made.sender_id, email="eve@bank.example.net")
        for key in (both.eve, both.service, both.operator):
            update = senders.UpdateSender(UpdateSenderRequest(sender=other), metadata=key)
            assert (await refusal_of(update)).reason == "SENDER_DOMAIN_NOT_ALLOWED"
        for_eve = CreateSenderRequest(user_id="eve", sender=Sender(email="x@bank.example.net"))
        create = senders.CreateSender(for_eve, metadata=both.operator)
        assert (await refusal_of(create)).reason == "SENDER_DOMAIN_NOT_ALLOWED"
        renamed = Sender(sender_id=made.sender_id, display_name="Eve")
        assert await senders.UpdateSender(UpdateSenderRequest(sender=renamed), metadata=both.eve)
