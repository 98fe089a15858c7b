"""Page and resume tokens with a valid checksum and forged content."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Final

import pytest
from outbox.v1 import api_key_pb2, suppression_pb2, user_pb2
from outbox.v1 import api_key_service_pb2 as api_keys
from outbox.v1 import audit_service_pb2 as audit
from outbox.v1 import batch_service_pb2 as batches
from outbox.v1 import email_job_service_pb2 as jobs
from outbox.v1 import sender_service_pb2 as senders
from outbox.v1 import stats_service_pb2 as stats
from outbox.v1 import stats_service_pb2_grpc as stats_grpc
from outbox.v1 import suppression_service_pb2 as suppressions
from outbox.v1 import user_service_pb2 as users
from outbox.v1 import webhook_service_pb2 as webhooks

from outbox_server.shared.rpc.page_tokens import MAX_ID, digest_filters
from tests.contract_methods import contract_methods
from tests.eventually import PATIENCE
from tests.forged_tokens import content_of, forged
from tests.scheduler_stack import Scheduler, refusal_of, running_scheduler
from tests.stats_stack import stats_server

# No list has a position like these, whatever types the parts have.
NEVER_OURS: Final = (
    b"",
    b"5",
    b"null",
    b"{}",
    b"[]",
    b"[1",
    b"[null]",
    b"[true]",
    b"[1.5]",
    b"[1e400]",
    b"[NaN]",
    b"[-1]",
    b"[-1,-1]",
    b"[[1],[1]]",
    b"[9223372036854775808]",
    b"[9223372036854775808,1]",
    b"[1,9223372036854775808]",
    b"[1,2,3]",
    b'["a","b"]',
    b'["\\u0000"]',
    b'["\\ud800"]',
    b"[" * 2_900,
    b"[" + b"9" * 2_900 + b"]",
    b"\xff\xfe",
)
# By list: content with permitted types in the wrong places, or beyond the range of a column.
WRONG_HERE: Final = {
    "senders": (b'["1"]', b"[1,1]"),
    "batches": (b'["1"]', b"[1,1]"),
    "rejections": (b'["1"]', b"[1,1]"),
    "email_jobs": (b'["1",1]', b"[1]"),
    "attempts": (b'["1"]', b"[32768]"),
    "suppressions": (b"[1]", b'["\xc3"]'),
    "audit_events": (b'["1",1]', b"[1]"),
    "api_keys": (b"[1]", b'["\xc3"]'),
    "webhooks": (b'["1"]', b"[1,1]"),
    "webhook_deliveries": (b'["1"]', b"[1,1]"),
    "user_stats": (b'["1"]', b"[1,1]"),
    "users": (b"[1]", b'["\xc3"]'),
}


@dataclass(frozen=True)
class ListMethod:
    """A method with pages: how to call it, and what its tokens contain besides the position."""

    call: Callable[..., Any]
    request: Any
    kind: str
    filters: tuple[object, ...]
    # The content of tokens with permitted types, at both ends of their range.
    ends: Sequence[bytes]

    def token(self, payload: bytes) -> str:
        return forged(self.kind, digest_filters(*self.filters), payload)

    async def page(self, token: str) -> Any:
        request = type(self.request)()
        request.CopyFrom(self.request)
        request.page_token, request.page_size = token, 1
        return await self.call(request, timeout=PATIENCE)


ONE_ID: Final = (b"[0]", b"[%d]" % MAX_ID)


@pytest.fixture
async def lists(database_url: str, redis_url: str) -> AsyncIterator[dict[str, ListMethod]]:
    async with AsyncExitStack() as stack:
        scheduler = await stack.enter_async_context(running_scheduler(database_url, redis_url))
        channel = await stack.enter_async_context(stats_server(database_url, redis_url))
        yield await _lists(scheduler, stats_grpc.StatsServiceStub(channel))


async def _lists(scheduler: Scheduler, stub: stats_grpc.StatsServiceStub) -> dict[str, ListMethod]:
    """Create what fills two pages of each list."""
    await scheduler.sender()
    sender = await scheduler.sender()
    await scheduler.schedule(sender)
    accepted = await scheduler.schedule(sender, "email\na@b.org\nc@d.org\nx\ny\n")
    for address in ("a@example.com", "b@example.com"):
        await scheduler.suppressions.CreateSuppression(
            suppressions.CreateSuppressionRequest(
                user_id="ann", suppression=suppression_pb2.Suppression(email=address)
            )
        )
    batch = accepted.batch.batch_id
    (job,) = scheduler.rows("SELECT min(id) FROM email_jobs WHERE batch_id = %s", int(batch))[0]
    for number in (1, 2):
        scheduler.execute(
            "INSERT INTO attempts (email_job_id, attempt, sender_id, started_at, ended_at, outcome,"
            " counted, message) VALUES (%s, %s, %s, now(), now(), 3, true, '')",
            job,
            number,
            int(sender.sender_id),
        )
    for number in (1, 2):
        scheduler.execute(
            "INSERT INTO webhooks (id, user_id, url, secret, disabled, after_event)"
            " VALUES (%s, 'ann', '', '', true, 0)",
            number,
        )
        scheduler.execute(
            "INSERT INTO webhook_deliveries (id, webhook_id, after_event, last_event, event_count,"
            " error) VALUES (%s, 1, 0, 1, 1, '')",
            number,
        )
    for user_id in ("ann", "ben"):
        user = user_pb2.User(user_id=user_id, quotas=user_pb2.UserQuotas(senders=100))
        await scheduler.users.UpdateUser(users.UpdateUserRequest(user=user))
        key = api_key_pb2.ApiKey(kind=api_key_pb2.API_KEY_KIND_USER, user_id=user_id)
        await scheduler.api_keys.CreateApiKey(api_keys.CreateApiKeyRequest(api_key=key))
    return {
        "ListUsers": ListMethod(
            scheduler.users.ListUsers, users.ListUsersRequest(), "users", (), (b'[""]', b'["z"]')
        ),
        "ListApiKeys": ListMethod(
            scheduler.api_keys.ListApiKeys,
            api_keys.ListApiKeysRequest(),
            "api_keys",
            (None,),
            (b'[""]', b'["z"]'),
        ),
        "ListSenders": ListMethod(
            scheduler.senders.ListSenders,
            senders.ListSendersRequest(user_id="ann"),
            "senders",
            ("ann", 0),
            ONE_ID,
        ),
        "ListBatches": ListMethod(
            scheduler.batches.ListBatches,
            batches.ListBatchesRequest(user_id="ann"),
            "batches",
            ("ann", None),
            ONE_ID,
        ),
        "ListRejections": ListMethod(
            scheduler.batches.ListRejections,
            batches.ListRejectionsRequest(batch_id=batch),
            "rejections",
            (None, int(batch)),
            ONE_ID,
        ),
        "ListEmailJobs": ListMethod(
            scheduler.jobs.ListEmailJobs,
            jobs.ListEmailJobsRequest(batch_id=batch),
            "email_jobs",
            (None, "", batch, 0, ""),
            (b"[0,0]", b"[%d,0]" % MAX_ID, b"[0,%d]" % MAX_ID, b"[%d,%d]" % (MAX_ID, MAX_ID)),
        ),
        "ListAttempts": ListMethod(
            scheduler.jobs.ListAttempts,
            jobs.ListAttemptsRequest(email_job_id=str(job)),
            "attempts",
            (None, job),
            (b"[0]", b"[32767]"),
        ),
        "ListSuppressions": ListMethod(
            scheduler.suppressions.ListSuppressions,
            suppressions.ListSuppressionsRequest(user_id="ann"),
            "suppressions",
            ("ann",),
            (b'[""]', b'["%s"]' % (b"z" * 3_000), b'["\\udbff\\udfff"]', b'["\\u001f%s\'"]'),
        ),
        "ListAuditEvents": ListMethod(
            scheduler.audit.ListAuditEvents,
            audit.ListAuditEventsRequest(),
            "audit_events",
            (None, None, None, None),
            (b"[0,0]", b"[%d,0]" % MAX_ID, b"[0,%d]" % MAX_ID, b"[%d,%d]" % (MAX_ID, MAX_ID)),
        ),
        "ListWebhooks": ListMethod(
            scheduler.webhooks.ListWebhooks,
            webhooks.ListWebhooksRequest(user_id="ann"),
            "webhooks",
            ("ann",),
            ONE_ID,
        ),
        "ListWebhookDeliveries": ListMethod(
            scheduler.webhooks.ListWebhookDeliveries,
            webhooks.ListWebhookDeliveriesRequest(webhook_id="1"),
            "webhook_deliveries",
            (None, "1"),
            ONE_ID,
        ),
        "GetUserStats": ListMethod(
            stub.GetUserStats,
            stats.GetUserStatsRequest(user_id="ann"),
            "user_stats",
            ("ann",),
            ONE_ID,
        ),
    }


async def test_a_forged_page_token_is_an_invalid_argument_in_every_list(
    lists: dict[str, ListMethod],
) -> None:
    assert lists.keys() == {
        method.name
        for method in contract_methods()
        # The methods that change a set of jobs in parts have tokens of their own, and no pages.
        if {"page_token", "page_size"} <= set(method.input_type.fields_by_name)
    }
    for name, method in lists.items():
        # The forger knows how tokens are made: its own spelling of a real one is accepted.
        real = (await method.page("")).next_page_token
        assert real, name
        assert method.token(content_of(real)) == real, name
        await method.page(real)
        # In range, so it is a place in the list.
        await asyncio.gather(*(method.page(method.token(payload)) for payload in method.ends))
        # Of another list, of the other type, or a number that no column of the list can have.
        others = [other.token(other.ends[0]) for other in lists.values() if other is not method]
        odd = [*NEVER_OURS, *WRONG_HERE[method.kind]]
        tokens = [*others, *map(method.token, odd)]
        refusals = await asyncio.gather(*(refusal_of(method.page(token)) for token in tokens))
        for token, refusal in zip(tokens, refusals, strict=True):
            about = (name, content_of(token)[:40], refusal)
            assert refusal.code == "INVALID_ARGUMENT", about
            assert refusal.reason == "PAGE_TOKEN_INVALID", about
            assert set(refusal.violations) == {"page_token"}, about
