"""Filters and orders of lists with few results, and of those for operators, on real stores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest
from outbox.v1.api_key_pb2 import API_KEY_KIND_SERVICE as SERVICE
from outbox.v1.api_key_pb2 import API_KEY_KIND_USER as USER
from outbox.v1.api_key_pb2 import ApiKey
from outbox.v1.api_key_service_pb2 import (
    CreateApiKeyRequest,
    ListApiKeysRequest,
    RevokeApiKeyRequest,
)
from outbox.v1.audit_pb2 import AuditEvent
from outbox.v1.audit_service_pb2 import ListAuditEventsRequest
from outbox.v1.batch_service_pb2 import ListRejectionsRequest
from outbox.v1.email_job_service_pb2 import ListAttemptsRequest
from outbox.v1.user_pb2 import User, UserQuotas
from outbox.v1.user_service_pb2 import ListUsersRequest, UpdateUserRequest
from outbox.v1.webhook_service_pb2 import ListWebhookDeliveriesRequest, ListWebhooksRequest

from outbox_server.services.scheduler.storage import bounded
from outbox_server.services.scheduler.storage import users as storage_of_users
from tests.scheduler_stack import Scheduler


async def test_rejections_webhooks_and_their_deliveries_are_filtered_and_ordered(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    csv = "email,name\na@b.org,A\nx,B\n,C\ny,D\n"
    batch = (await scheduler.schedule(await scheduler.sender("ann"), csv)).batch
    for number, disabled in ((1, False), (2, True), (3, False)):
        scheduler.execute(
            "INSERT INTO webhooks (id, user_id, url, secret, after_event, disabled, next_at)"
            " VALUES (%s, 'ann', %s, '', 0, %s, now() + interval '1 day')",
            *(number, f"https://x.org/{number}", disabled),
        )
        # Of the first webhook.
        scheduler.execute(
            "INSERT INTO webhook_deliveries (id, webhook_id, after_event, last_event, event_count,"
            " error, http_status, next_at) VALUES (%s, 1, 0, 1, %s, '', %s, %s)",
            *(number, number, {1: None, 2: 503, 3: 404}[number]),
            datetime.now(UTC) + timedelta(hours=1) if number == 2 else None,
        )
    await check_lists(
        monkeypatch,
        scheduler.batches.ListRejections,
        partial(ListRejectionsRequest, batch_id=batch.batch_id),
        ("rejections", "row_number", "row_number"),
        {
            "": ["2", "3", "4"],
            "reason = ADDRESS_INVALID": ["2", "4"],
            "row_number > 2 AND column = email": ["3", "4"],
            "column = name": [],
        },
    )
    await check_lists(
        monkeypatch,
        scheduler.webhooks.ListWebhooks,
        partial(ListWebhooksRequest, user_id="ann"),
        ("webhooks", "webhook_id", "create_time"),
        {
            "": ["1", "2", "3"],
            "disabled = true": ["2"],
            "url = https://x.org/3": ["3"],
            "sender_id = 7": [],
            "create_time < 2026-01-01T00:00:00Z": [],
        },
    )
    await check_lists(
        monkeypatch,
        scheduler.webhooks.ListWebhookDeliveries,
        partial(ListWebhookDeliveriesRequest, webhook_id="1"),
        ("webhook_deliveries", "webhook_delivery_id", "create_time"),
        {
            "": ["1", "2", "3"],
            "state = PENDING": ["2"],
            "state = WEBHOOK_DELIVERY_STATE_FAILED": ["1", "3"],
            "http_status = 0 OR http_status = 404": ["1", "3"],
            "next_attempt_time > 2026-01-01T00:00:00Z": ["2"],
            "event_count >= 2 AND attempt_count = 1": ["2", "3"],
        },
    )


async def test_attempts_and_users_are_filtered_and_ordered(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    for user in ("ann", "bob", "cleo"):
        sender = await scheduler.sender(user)
    await scheduler.schedule(sender)
    (job,) = scheduler.rows("SELECT id FROM email_jobs")[0]
    number = scheduler.value(
        "INSERT INTO dispatchers (dispatcher_id, concurrency, seen_at, draining, in_flight,"
        " sent_per_second, attempts_per_second) VALUES ('d', 1, now(), false, 0, 0, 0)"
        " RETURNING id"
    )
    for attempt, outcome, code, reply, end in (
        (1, 4, None, None, "mx.example.com:25"),
        (2, 2, 451, 7, "relay"),
        (32_767, 1, 250, 1, "relay"),
    ):
        scheduler.execute(
            "INSERT INTO attempts (email_job_id, attempt, sender_id, started_at, ended_at, outcome,"
            " counted, smtp_code, reply_class, endpoint, dispatcher)"
            " VALUES (%s, %s, 1, now(), now(), %s, true, %s, %s, %s, %s)",
            *(job, attempt, outcome, code, reply, end, number if reply else None),
        )
    await check_lists(
        monkeypatch,
        scheduler.jobs.ListAttempts,
        partial(ListAttemptsRequest, email_job_id=str(job)),
        ("attempts", "attempt_number", "attempt_number"),
        {
            "": ["1", "2", "32767"],
            "outcome = SENT OR outcome = ATTEMPT_OUTCOME_CONNECTION_FAILURE": ["1", "32767"],
            "smtp_code >= 400 AND smtp_code < 999999999999": ["2"],
            "NOT smtp_code = 250": ["1", "2"],
            "reply_class != SENT": ["1", "2"],
            "reply_class = REPLY_CLASS_SENT": ["32767"],
            "dispatcher_id = d": ["2", "32767"],
            "endpoint = mx.example.com:25": ["1"],
            "attempt_number > 1 AND end_time > 2026-01-01T00:00:00Z": ["2", "32767"],
            "enhanced_code = 5.1.1": [],
        },
    )
    await scheduler.users.UpdateUser(
        UpdateUserRequest(user=User(user_id="bob", quotas=UserQuotas(senders=7)))
    )
    monkeypatch.setattr(storage_of_users, "_MOST_READ", 2)
    await check_lists(
        monkeypatch,
        scheduler.users.ListUsers,
        ListUsersRequest,
        ("users", "user_id", "user_id"),
        {
            "": ["ann", "bob", "cleo"],
            "user_id = cleo": ["cleo"],
            "user_id = nobody": [],
            "user_id != bob": ["ann", "cleo"],
            "update_time > 2026-01-01T00:00:00Z": ["bob"],
            "update_time != 2026-01-01T00:00:00Z": ["ann", "bob", "cleo"],
        },
    )


async def test_keys_and_the_audit_log_are_filtered_and_ordered(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = datetime.now(UTC)
    made = [
        await scheduler.api_keys.CreateApiKey(CreateApiKeyRequest(api_key=key, identity="carol"))
        for key in (
            ApiKey(kind=USER, user_id="ann"),
            ApiKey(kind=SERVICE, read_only=True),
            ApiKey(kind=SERVICE, display_name="shop"),
        )
    ]
    anns, reads, shop = (answer.api_key.api_key_id for answer in made)
    await scheduler.api_keys.RevokeApiKey(RevokeApiKeyRequest(api_key_id=shop))
    await check_lists(
        monkeypatch,
        scheduler.api_keys.ListApiKeys,
        ListApiKeysRequest,
        ("api_keys", "api_key_id", "api_key_id"),
        {
            "": sorted([anns, reads, shop]),
            "kind = USER": [anns],
            "kind = API_KEY_KIND_SERVICE": sorted([reads, shop]),
            "read_only = true": [reads],
            "display_name = shop": [shop],
            "user_id != ann": sorted([reads, shop]),
            "revoke_time > 2026-01-01T00:00:00Z": [shop],
            "expire_time > 2026-01-01T00:00:00Z": [],
        },
    )
    await scheduler.sender("bob")
    every = await all_of(scheduler.audit.ListAuditEvents, ListAuditEventsRequest(), "audit_events")
    assert len(every) == 5
    middle = every[2].event_time.ToDatetime(UTC)

    def of(matches: Callable[[AuditEvent], bool]) -> list[str]:
        return [event.audit_event_id for event in every if matches(event)]

    await check_lists(
        monkeypatch,
        scheduler.audit.ListAuditEvents,
        ListAuditEventsRequest,
        ("audit_events", "audit_event_id", "event_time"),
        {
            "": of(lambda _: True),
            "action = CreateApiKey": of(lambda event: event.action == "CreateApiKey"),
            "identity = carol AND actor = local": of(lambda event: event.identity == "carol"),
            "user_id = ann OR user_id = bob": of(lambda event: bool(event.user_id)),
            "user_id = bob": of(lambda event: event.user_id == "bob"),
            f"target = api-keys/{shop}": of(lambda event: event.target.endswith(shop)),
            f"event_time < {began.isoformat()}": [],
            f"event_time >= {middle.isoformat()}": of(
                lambda event: event.event_time.ToDatetime(UTC) >= middle
            ),
        },
        descending_by_default=True,
    )


async def check_lists(
    monkeypatch: pytest.MonkeyPatch,
    call: Any,
    request: Callable[..., Any],
    fields: tuple[str, str, str],
    expected: Mapping[str, list[str]],
    *,
    descending_by_default: bool = False,
) -> None:
    """Check what filters find, in both orders, also if a page reads very few rows.

    `fields` are three names: the field of the answer that has the results, the one that identifies
    a result, and the one that orders the list. `expected` has the ids in the default order.
    """
    results, key, ordered = fields
    for most in (bounded.MOST_READ, 2):
        monkeypatch.setattr(bounded, "MOST_READ", most)
        for text, wanted in expected.items():
            for order in ("", ordered, f"{ordered} desc"):
                asked = request(filter=text, order_by=order, page_size=1)
                seen = [str(getattr(one, key)) for one in await all_of(call, asked, results)]
                turned = bool(order) and order.endswith(" desc") != descending_by_default
                assert seen == (wanted[::-1] if turned else wanted), (text, order)


async def all_of(call: Any, request: Any, results: str) -> list[Any]:
    """Return the results of all pages."""
    found: list[Any] = []
    while True:
        page = await call(request)
        found += getattr(page, results)
        request.page_token = page.next_page_token
        if not request.page_token:
            return found
