"""Hostile values in every field of every method: a clear answer, in time, and no change."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Final

import grpc
import pytest
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import MethodDescriptor
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import settings
from outbox.v1 import (  # noqa: F401 - importing them is what makes the services known
    api_key_pb2,
    api_key_service_pb2,
    audit_service_pb2,
    batch_service_pb2,
    dispatcher_service_pb2,
    email_job_event_service_pb2,
    email_job_service_pb2,
    hold_service_pb2,
    sender_service_pb2,
    server_service_pb2,
    stats_service_pb2,
    suppression_service_pb2,
    user_service_pb2,
    webhook_pb2,
    webhook_service_pb2,
)

from outbox_server.shared.secrets import generate_key
from outbox_server.shared.states import JobState
from tests.eventually import PATIENCE
from tests.fingerprint import Fingerprint
from tests.hostile import Requests
from tests.scheduler_stack import Scheduler, running_scheduler
from tests.stats_stack import stats_server

# The least number of hostile calls per seed, three rounds. With each seed, every method answers OK
# once, after 1,000 calls in all. No seed takes long, so that workers share them: there are four,
# and twelve with `make test-search`.
CALLS: Final = 420
SEEDS: Final = range(1, 1 + max(1, min(12, settings().max_examples * 4 // 50)))
MOST_CALLS: Final = 3_000
# The least number of calls per round. A round also creates resources and reads all tables, so each
# method is called twice in one, and a method that has not answered OK yet more often.
CALLS_PER_ROUND: Final = 40
AT_ONCE: Final = 20
# Nothing changes while a stream is read, so it may have no second message.
SECOND_MESSAGE_S: Final = 0.05
SCHEDULER: Final = (
    "SenderService",
    "BatchService",
    "EmailJobEventService",
    "EmailJobService",
    "SuppressionService",
    "HoldService",
    "UserService",
    "WebhookService",
    "ServerService",
    "ApiKeyService",
    "AuditService",
)
# Low, so that quotas refuse some calls: a refused call changes nothing.
QUOTAS: Final = {"user_senders": 2, "user_waiting_jobs": 5, "user_stored_rejections": 5}

# The permitted codes of the answer to a meaningless request.
ANSWERS: Final = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNIMPLEMENTED,
}


def methods(*services: str) -> Iterator[MethodDescriptor]:
    pool = descriptor_pool.Default()
    for service in services:
        yield from pool.FindServiceByName(f"outbox.v1.{service}").methods


@dataclass(frozen=True)
class RepeatableCall:
    """One call that can be repeated: its encoded messages, possibly none."""

    method: MethodDescriptor
    messages: tuple[bytes, ...]

    def __str__(self) -> str:
        return f"{self.method.full_name} {self.messages!r:.2000}"

    async def make(self, channel: grpc.aio.Channel) -> grpc.aio.AioRpcError | None:
        """Return the refusal, or None. A stream is read up to its third message."""
        path = f"/{self.method.containing_service.full_name}/{self.method.name}"
        try:
            if self.method.server_streaming:
                read: Any = channel.unary_stream(path)
                stream = read(self.messages[0], timeout=PATIENCE)
                for limit in (None, SECOND_MESSAGE_S, SECOND_MESSAGE_S):
                    async with asyncio.timeout(limit):
                        if await stream.read() is grpc.aio.EOF:
                            break
                stream.cancel()
            elif self.method.client_streaming:
                upload: Any = channel.stream_unary(path)
                await upload(iter(self.messages), timeout=PATIENCE)
            else:
                unary: Any = channel.unary_unary(path)
                await unary(self.messages[0], timeout=PATIENCE)
        except TimeoutError:
            stream.cancel()
        except grpc.aio.AioRpcError as error:
            return error
        return None


async def right_values(scheduler: Scheduler) -> dict[str, list[Any]]:
    """Replace all resources by a few new ones; return valid values by field name."""
    scheduler.execute("DELETE FROM users")
    # One address for test mails, and one whose suppression can be deleted.
    scheduler.execute("DELETE FROM suppressions")
    scheduler.execute(
        "INSERT INTO suppressions (user_id, address, reason) VALUES"
        " ('ann', 'news@example.com', ''), ('bob', 'news@example.com', '')"
    )
    for (old,) in scheduler.rows("SELECT id FROM senders WHERE deleted_at IS NULL"):
        delete = sender_service_pb2.DeleteSenderRequest(sender_id=str(old), force=True)
        await scheduler.senders.DeleteSender(delete)
    # Only what is held can be released and cancelled.
    await scheduler.holds.BeginHold(hold_service_pb2.BeginHoldRequest())
    first, second = await scheduler.sender(), await scheduler.sender("bob")
    batches = [
        await scheduler.schedule(each, "email,name\na@b.org,Ann\nc@d.org,Bo\ne@f.org,Cy\n")
        for each in (first, second)
    ]
    # One job whose mail may have arrived.
    scheduler.end_jobs(JobState.UNCERTAIN, "recipient = 'e@f.org'")
    for (old,) in scheduler.rows("SELECT id FROM webhooks"):
        await scheduler.webhooks.DeleteWebhook(
            webhook_service_pb2.DeleteWebhookRequest(webhook_id=str(old))
        )
    # No address of it may be reached.
    webhook = webhook_pb2.Webhook(url="https://10.0.0.1/hook")
    webhook = await scheduler.webhooks.CreateWebhook(
        webhook_service_pb2.CreateWebhookRequest(user_id="ann", webhook=webhook)
    )
    scheduler.execute(
        "INSERT INTO webhook_deliveries (id, webhook_id, after_event, last_event, event_count,"
        " error) VALUES (%s, %s, 0, 1, 1, '')",
        *(int(webhook.webhook_id) + 1, int(webhook.webhook_id)),
    )
    found = scheduler.rows("SELECT id FROM email_jobs WHERE sender_id = %s", int(first.sender_id))
    jobs = [str(row[0]) for row in found]
    key = await scheduler.api_keys.CreateApiKey(
        api_key_service_pb2.CreateApiKeyRequest(
            api_key=api_key_pb2.ApiKey(kind=api_key_pb2.API_KEY_KIND_SERVICE)
        )
    )
    return {
        "api_key_id": [key.api_key.api_key_id],
        "kind": [1],
        "user_id": ["ann", "ann", "ann", "bob"],
        "sender_id": [first.sender_id, first.sender_id, second.sender_id],
        "batch_id": [each.batch.batch_id for each in batches],
        "email_job_id": jobs,
        "email_job_ids": jobs,
        "webhook_id": [webhook.webhook_id],
        "webhook_delivery_id": [str(int(webhook.webhook_id) + 1)],
        "url": ["https://10.0.0.1/hook"],
        "email": ["a@b.org", "news@example.com"],
        "recipient": ["a@b.org"],
        "request_id": [f"request {n}" for n in range(5_000)],
        "subject": ["Hello", "Hello {{ name }}"],
        "body": ["Dear {{ name | default: 'friend' }}"],
        "html": ["<p>Hello</p>", "<p>{{ name }}</p>"],
        "csv": [b"email,name\na@b.org,Ann\n", b"email\nx@y.org\n"],
        "chunk": [b"email,name\na@b.org,Ann\n", b"x@y.org,Eve\n"],
        # The file of UploadBatchFile.
        "data": [b"email,name\na@b.org,Ann\n", b"x@y.org,Eve\n"],
        "content_type": ["", "text/csv"],
        "time_zone": ["Europe/Berlin", "UTC"],
        "key": ["name", "email", "city"],
        "host": ["127.0.0.1"],
        "port": [1],
        "page_size": [1, 50],
        "page_token": [""],
        "resume_token": [""],
        "hourly_limit": [10, 200],
        "max_in_flight": [1, 5],
        "display_name": ["The Shop"],
        "sender_domains": ["example.com", "*.example.com"],
        "senders": [2, 100],
        "waiting_jobs": [4, 100],
        "calls": [0, 1_000],
        "recipient_count": [1, 1_000],
    }


def complaint_of(error: grpc.aio.AioRpcError) -> str | None:
    """Return the violation of an answer, or None."""
    if error.code() not in ANSWERS:
        return "not an answer"
    status = rpc_status.from_call(error)
    info = error_details_pb2.ErrorInfo()
    if status is None or not status.details[0].Unpack(info) or not info.reason:
        return "no reason"
    # Bytes that are not a message have no fields.
    if error.code() is grpc.StatusCode.INVALID_ARGUMENT and info.reason != "MALFORMED_MESSAGE":
        request = error_details_pb2.BadRequest()
        if not any(detail.Unpack(request) for detail in status.details):
            return "which field?"
        if not all(each.field and each.description for each in request.field_violations):
            return "a violation that says nothing"
    return None


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.hypothesis
async def test_hostile_requests_get_a_clear_answer_and_change_nothing(
    database_url: str, redis_url: str, seed: int
) -> None:
    async with AsyncExitStack() as stack:
        scheduler = await stack.enter_async_context(
            running_scheduler(database_url, redis_url, encryption_keys=generate_key(), **QUOTAS)
        )
        channels = {
            "stats": await stack.enter_async_context(stats_server(database_url, redis_url)),
            "scheduler": await stack.enter_async_context(
                grpc.aio.insecure_channel(scheduler.address)
            ),
        }
        requests = Requests(seed)
        # The worker of webhooks changes their tables by itself.
        fingerprint = Fingerprint(scheduler, but=["webhooks", "webhook_deliveries"])
        served = [(method, "scheduler") for method in methods(*SCHEDULER)]
        served += [(method, "stats") for method in methods("StatsService")]
        codes: Counter[tuple[str, str]] = Counter()
        complaints: dict[str, str] = {}
        made = 0
        names = {method.name for method, _ in served}
        # After that, only methods that have not succeeded yet are called. Creating the resources
        # for a round costs more than its calls, so these calls are less hostile: rounds are few.
        while wanted := names if made < CALLS else _without_answer(names, codes):
            assert made < MOST_CALLS, wanted
            if made >= CALLS:
                requests.prefer_valid()
            # Created again, because some valid calls end or remove these resources.
            requests.learn(await right_values(scheduler))
            times = max(2, CALLS_PER_ROUND // len(wanted))
            group = [
                (_call(method, requests), channels[where])
                for method, where in served
                if method.name in wanted
                for _ in range(times)
            ]
            while group:
                before = await fingerprint.take()
                refused = await _make(group, codes, complaints)
                made += len(group)
                if len(refused) == len(group):
                    after = await fingerprint.take()
                    changed = [name for name, found in after.items() if found != before[name]]
                    assert not changed, [str(call) for call, _ in group]
                    break
                # A refused call among accepted ones is repeated alone.
                group = refused
        assert not complaints, "\n".join(map(": ".join, complaints.items()))


def _without_answer(names: set[str], codes: Counter[tuple[str, str]]) -> set[str]:
    """Return the served methods that have not answered OK yet."""
    return names - {name for name, code in codes if code in ("OK", "UNIMPLEMENTED")}


def _call(method: MethodDescriptor, requests: Requests) -> RepeatableCall:
    made = [requests.message(method.input_type)]
    if method.client_streaming:
        made = requests.upload(method.input_type)
    encoded = [each.SerializeToString() for each in made]
    if requests.number(19) == 0:
        encoded = [requests.damage(each) for each in encoded]
    return RepeatableCall(method, tuple(encoded))


async def _make(
    group: list[tuple[RepeatableCall, grpc.aio.Channel]],
    codes: Counter[tuple[str, str]],
    complaints: dict[str, str],
) -> list[tuple[RepeatableCall, grpc.aio.Channel]]:
    places = asyncio.Semaphore(AT_ONCE)
    refused = []

    async def make(call: RepeatableCall, channel: grpc.aio.Channel) -> None:
        async with places:
            error = await call.make(channel)
        complaint = error and complaint_of(error)
        if error and complaint:
            said = re.sub("[0-9a-f]{16}", "...", error.details() or "")
            about = f"{complaint} {error.code().name} {call.method.full_name}: {said}"
            complaints.setdefault(about, str(call))
        codes[call.method.name, error.code().name if error else "OK"] += 1
        if error:
            refused.append((call, channel))

    async with asyncio.TaskGroup() as tasks:
        for call, channel in group:
            tasks.create_task(make(call, channel))
    return refused
