"""Webhooks are changed and tested: what is recorded, and what the command line says."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
import pytest_asyncio
from google.protobuf.field_mask_pb2 import FieldMask
from outbox.v1.email_job_pb2 import EMAIL_JOB_STATE_FAILED, EMAIL_JOB_STATE_SENT
from outbox.v1.webhook_pb2 import Webhook
from outbox.v1.webhook_service_pb2 import (
    GetWebhookRequest,
    ListWebhookDeliveriesRequest,
    ListWebhooksRequest,
    RotateWebhookSecretRequest,
    UpdateWebhookRequest,
)
from outbox.v1.webhook_service_pb2 import TestWebhookRequest as TryRequest

from outbox_server.services.scheduler.webhooks import sign
from outbox_server.shared.secrets import generate_key
from tests.commands import outbox
from tests.misbehaving import EitherClient
from tests.scheduler_stack import Scheduler, refusal_of, running_scheduler
from tests.service.test_webhooks import Post, create, receiving

URL = "https://example.com/hook"


@pytest_asyncio.fixture
async def scheduler(database_url: str, redis_url: str) -> AsyncIterator[Scheduler]:
    async with running_scheduler(
        database_url, redis_url, encryption_keys=generate_key(), webhook_allow="127.0.0.1"
    ) as running:
        yield running


def actions(scheduler: Scheduler) -> list[str]:
    return [row[0] for row in scheduler.rows("SELECT action FROM audit_events ORDER BY id")]


async def test_a_test_message_is_in_the_audit_log(scheduler: Scheduler) -> None:
    async with receiving("503 Busy") as receiver:
        webhook = await create(scheduler, receiver.url)
        request = TryRequest(webhook_id=webhook.webhook_id, identity="ann", reason="try it")
        await scheduler.webhooks.TestWebhook(request)
    events = scheduler.rows("SELECT action, target, identity, reason, after FROM audit_events")
    assert events[-1] == (
        "TestWebhook",
        f"webhooks/{webhook.webhook_id}",
        "ann",
        "try it",
        {"delivered": False, "http_status": 503},
    )


async def test_present_values_change_nothing(scheduler: Scheduler) -> None:
    states = [EMAIL_JOB_STATE_FAILED, EMAIL_JOB_STATE_SENT]
    webhook = await create(scheduler, URL, states=states)

    async def update(**fields: object) -> Webhook:
        asked = Webhook(webhook_id=webhook.webhook_id, **fields)  # type: ignore[arg-type]
        mask = FieldMask(paths=list(fields))
        request = UpdateWebhookRequest(webhook=asked, update_mask=mask)
        return await scheduler.webhooks.UpdateWebhook(request)

    same = await update(url=URL, states=states, disabled=False)
    assert same.etag == webhook.etag
    assert actions(scheduler) == ["CreateWebhook"]
    stopped = await update(url=URL, disabled=True)
    assert stopped.etag != webhook.etag
    assert (await update(disabled=True)).etag == stopped.etag
    assert actions(scheduler) == ["CreateWebhook", "UpdateWebhook"]
    # One that failed is enabled again.
    enabled = await update(disabled=False)
    scheduler.execute("UPDATE webhooks SET failures = 3, failing_since = now(), error = 'x'")
    again = await update(disabled=False)
    assert (again.last_error, again.etag != enabled.etag) == ("", True)


async def test_the_command_line_tests_checks_and_widens_a_webhook(scheduler: Scheduler) -> None:
    async with receiving("204 No Content", "503 Busy") as receiver:
        webhook = await create(scheduler, receiver.url, states=[EMAIL_JOB_STATE_SENT])
        test = ("webhooks", "test", webhook.webhook_id)
        done = await outbox(scheduler, *test)
        assert (done.exit_code, done.stderr) == (0, "")
        done = await outbox(scheduler, *test)
    assert done.exit_code == 1
    assert done.stderr == ("outbox: the test message was not delivered: 127.0.0.1 answered 503\n")
    done = await outbox(scheduler, *test)
    assert done.stderr == (
        "outbox: the test message was not delivered: "
        f"no connection to 127.0.0.1, port {receiver.port}: Connection refused\n"
    )
    done = await outbox(scheduler, "webhooks", "create", "ftp://example.com", "--user", "ann")
    assert done.stderr.startswith("outbox: URL: must be an absolute https URL"), done.stderr
    update = ("webhooks", "update", webhook.webhook_id)
    done = await outbox(scheduler, *update, "--url", "ftp://example.com")
    assert done.stderr.startswith("outbox: --url: must be"), done.stderr
    done = await outbox(scheduler, *update, "--unset", "states")
    assert done.exit_code == 0, done.stderr
    request = GetWebhookRequest(webhook_id=webhook.webhook_id)
    assert list((await scheduler.webhooks.GetWebhook(request)).states) == []
    wrong = await outbox(scheduler, *update, "--unset", "secret")
    assert (wrong.exit_code, "UPDATE_MASK_INVALID" in wrong.stderr) == (1, True)


@pytest.mark.parametrize("kind", ["asyncio", "threads"])
async def test_the_clients_list_webhooks_and_deliveries_across_pages(
    scheduler: Scheduler, kind: str
) -> None:
    made = [(await create(scheduler, URL, disabled=True)).webhook_id for _ in range(3)]
    scheduler.execute(
        "INSERT INTO webhook_deliveries (id, webhook_id, after_event, last_event, event_count,"
        " error) SELECT n, %s, n, n + 1, 1, 'x' FROM generate_series(1, 3) n",
        int(made[0]),
    )
    client = EitherClient(kind)
    webhooks = await client.do(
        scheduler.address,
        lambda c: c.list_webhooks(ListWebhooksRequest(user_id="ann", page_size=2)),
    )
    assert [one.webhook_id for one in webhooks] == made
    request = ListWebhookDeliveriesRequest(webhook_id=made[0], page_size=2)
    deliveries = await client.do(scheduler.address, lambda c: c.list_webhook_deliveries(request))
    assert [one.webhook_delivery_id for one in deliveries] == ["1", "2", "3"]


def signers(post: Post, **secrets: str) -> list[str]:
    """Return whose signatures a request has, in their order."""
    stamp = int(post.headers["webhook-timestamp"])
    names = {
        sign([secret], post.headers["webhook-id"], stamp, post.body): name
        for name, secret in secrets.items()
    }
    return [names[one] for one in post.headers["webhook-signature"].split(" ")]


async def test_the_secret_before_a_rotation_signs_too_for_a_time(scheduler: Scheduler) -> None:
    async with receiving() as receiver:
        webhook = await create(scheduler, receiver.url)
        test = TryRequest(webhook_id=webhook.webhook_id)
        request = RotateWebhookSecretRequest(
            webhook_id=webhook.webhook_id, request_id="once", etag=webhook.etag
        )
        rotated = await scheduler.webhooks.RotateWebhookSecret(request)
        assert await scheduler.webhooks.RotateWebhookSecret(request) == rotated
        assert rotated.secret.startswith("whsec_")
        assert rotated.etag != webhook.etag
        left = scheduler.value("SELECT old_secret_until - now() FROM webhooks")
        assert timedelta(hours=23) < left <= timedelta(hours=24)
        await scheduler.webhooks.TestWebhook(test)
        secrets = {"first": webhook.secret, "second": rotated.secret}
        assert signers(receiver.posts[-1], **secrets) == ["second", "first"]
        scheduler.execute("UPDATE webhooks SET old_secret_until = now()")
        await scheduler.webhooks.TestWebhook(test)
        assert signers(receiver.posts[-1], **secrets) == ["second"]
        found = await scheduler.webhooks.GetWebhook(
            GetWebhookRequest(webhook_id=webhook.webhook_id)
        )
        assert (found.secret, found.HasField("old_secret_expire_time")) == ("", False)
        # After a leak, the old one ends at once.
        words = ("webhooks", "rotate-secret", webhook.webhook_id, "--keep-old", "0s")
        shown = re.search(r"whsec_\S+", (await outbox(scheduler, *words)).stdout)
        assert shown is not None
        secrets["third"] = shown[0]
        await scheduler.webhooks.TestWebhook(test)
        assert signers(receiver.posts[-1], **secrets) == ["third"]
    stored = b"".join(scheduler.rows("SELECT secret, old_secret FROM webhooks")[0])
    answers = b"".join(row[0] for row in scheduler.rows("SELECT answer FROM change_requests"))
    for secret in secrets.values():
        assert secret.encode() not in stored + answers
    assert actions(scheduler).count("RotateWebhookSecret") == 2
    for days in (-1, 8):
        request = RotateWebhookSecretRequest(webhook_id=webhook.webhook_id)
        request.old_secret_duration.FromTimedelta(timedelta(days=days))
        refusal = await refusal_of(scheduler.webhooks.RotateWebhookSecret(request))
        assert refusal.reason == "OLD_SECRET_DURATION_INVALID"
    request = RotateWebhookSecretRequest(webhook_id=webhook.webhook_id, user_id="bob")
    refusal = await refusal_of(scheduler.webhooks.RotateWebhookSecret(request))
    assert refusal.reason == "WEBHOOK_NOT_FOUND"
