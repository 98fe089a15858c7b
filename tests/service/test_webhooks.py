"""Webhooks: events posted to a URL of the user's, signed, at least once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import psycopg
import pytest
import pytest_asyncio
from google.protobuf.field_mask_pb2 import FieldMask
from outbox.v1.email_job_pb2 import EMAIL_JOB_STATE_SENT
from outbox.v1.webhook_pb2 import WEBHOOK_DELIVERY_STATE_FAILED, Webhook
from outbox.v1.webhook_service_pb2 import (
    CreateWebhookRequest,
    DeleteWebhookRequest,
    GetWebhookRequest,
    ListWebhookDeliveriesRequest,
    ListWebhooksRequest,
    RedeliverWebhookRequest,
    UpdateWebhookRequest,
)
from outbox.v1.webhook_service_pb2 import TestWebhookRequest as TryRequest

from outbox_server.services.scheduler import webhook_delivery
from outbox_server.services.scheduler.webhooks import check_url, sign
from outbox_server.shared.egress import Egress
from outbox_server.shared.errors import InvalidInput
from outbox_server.shared.secrets import generate_key
from tests.eventually import eventually
from tests.scheduler_stack import Scheduler, refusal_of, running_scheduler


@dataclass
class Post:
    headers: dict[str, str]
    body: bytes

    @property
    def content(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found

    def events(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.content["data"].get("email_job_events", [])
        return found


@dataclass
class Receiver:
    """An HTTP server that keeps what it gets, and answers with the next of `answers`, then 204."""

    answers: list[str] = field(default_factory=list)
    posts: list[Post] = field(default_factory=list)
    hang: asyncio.Event | None = None
    # Whether connections stay open after an answer.
    keeps: bool = False
    connections: int = 0
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            await self.answer(reader, writer)
            while self.keeps:
                await self.answer(reader, writer)
        except asyncio.IncompleteReadError:
            pass
        writer.close()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        lines = [line.partition(": ") for line in head.split("\r\n")[1:] if line]
        headers = {name.lower(): value for name, _, value in lines}
        body = await reader.readexactly(int(headers["content-length"]))
        self.posts.append(Post(headers, body))
        if self.hang is not None:
            await self.hang.wait()
        answer = self.answers.pop(0) if self.answers else "204 No Content"
        writer.write(f"HTTP/1.1 {answer}\r\nContent-Length: 0\r\n\r\n".encode())

    def job_events(self) -> list[dict[str, Any]]:
        return [event for post in self.posts for event in post.events()]


@asynccontextmanager
async def receiving(*answers: str) -> AsyncIterator[Receiver]:
    receiver = Receiver(list(answers))
    server = await asyncio.start_server(receiver.serve, "127.0.0.1", 0)
    receiver.port = server.sockets[0].getsockname()[1]
    async with server:
        yield receiver


@pytest.fixture
def backoff() -> str:
    """The waits before a failed request is tried again."""
    return "100ms,200ms"


@pytest_asyncio.fixture
async def scheduler(database_url: str, redis_url: str, backoff: str) -> AsyncIterator[Scheduler]:
    async with running_scheduler(
        database_url,
        redis_url,
        min_gap="0",
        encryption_keys=generate_key(),
        webhook_allow="127.0.0.1",
        webhook_backoff=backoff,
    ) as running:
        yield running


async def create(scheduler: Scheduler, url: str, user_id: str = "ann", **fields: Any) -> Webhook:
    return await scheduler.webhooks.CreateWebhook(
        CreateWebhookRequest(user_id=user_id, webhook=Webhook(url=url, **fields))
    )


async def change(scheduler: Scheduler, statement: str) -> None:
    """Change rows that the worker may have locked: it runs in this event loop."""
    await asyncio.to_thread(scheduler.execute, statement)


async def end_rests(scheduler: Scheduler) -> None:
    """End the rests after failures, which are shorter than leases."""
    await change(
        scheduler,
        "UPDATE webhooks SET next_at = now()"
        " WHERE failures > 0 AND next_at BETWEEN now() AND now() + interval '20 s'",
    )


async def test_events_are_posted_in_order_and_signed(scheduler: Scheduler) -> None:
    async with receiving() as receiver:
        webhook = await create(scheduler, receiver.url)
        assert webhook.secret.startswith("whsec_")
        batch = (await scheduler.schedule(await scheduler.sender())).batch
        await eventually(lambda: len(receiver.posts) == 1)
        scheduler.execute("UPDATE email_jobs SET scheduled_at = '2031-01-01Z'")
        await eventually(lambda: len(receiver.posts) == 2)
    first, second = receiver.posts
    assert first.content["type"] == "email_jobs.changed"
    assert first.events()[0]["batch_id"] == batch.batch_id
    assert second.events()[0]["schedule_time"] == "2031-01-01T00:00:00Z"
    assert first.headers["webhook-id"] != second.headers["webhook-id"]
    for post in receiver.posts:
        stamp = int(post.headers["webhook-timestamp"])
        expected = sign([webhook.secret], post.headers["webhook-id"], stamp, post.body)
        assert post.headers["webhook-signature"] == expected


@pytest.mark.parametrize("keeps", [True, False])
async def test_many_events_are_posted_in_some_requests_over_one_connection(
    scheduler: Scheduler, *, keeps: bool
) -> None:
    async with receiving() as receiver:
        receiver.keeps = keeps
        await create(scheduler, receiver.url)
        csv = "email\n" + "".join(f"{n}@b.org\n" for n in range(250))
        await scheduler.schedule(await scheduler.sender(), csv)
        await eventually(lambda: len(receiver.posts) == 1)
        before = receiver.connections
        await change(scheduler, "UPDATE email_jobs SET scheduled_at = '2031-01-01Z'")
        await eventually(lambda: len(receiver.job_events()) == 251)
        assert [len(post.events()) for post in receiver.posts] == [1, 100, 100, 50]
        ids = [int(event["email_job_event_id"]) for event in receiver.job_events()]
        assert ids == sorted(set(ids))
        # A server that closes a connection without a word gets another one.
        assert receiver.connections - before == (1 if keeps else 3)
        assert scheduler.value("SELECT count(*) FROM webhook_deliveries") == 0


def test_a_signature_is_that_of_standard_webhooks() -> None:
    # The example of the specification's reference libraries.
    assert (
        sign(
            ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"],
            "msg_p5jXN8AQM9LWM0D4loKWxJek",
            1614265330,
            b'{"test": 2432232314}',
        )
        == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    )


async def test_a_failed_request_is_tried_again_then_given_up_and_redelivered(
    scheduler: Scheduler,
) -> None:
    # A redirect is not followed.
    refusals = ["500 No", "302 Found", "404 Not Found"]
    async with receiving(*refusals) as receiver:
        webhook = await create(scheduler, receiver.url)
        await scheduler.schedule(await scheduler.sender())
        listed = ListWebhookDeliveriesRequest(webhook_id=webhook.webhook_id, user_id="ann")

        async def given_up() -> Any:
            await end_rests(scheduler)
            found = (await scheduler.webhooks.ListWebhookDeliveries(listed)).webhook_deliveries
            return found and found[0].state == WEBHOOK_DELIVERY_STATE_FAILED and found[0]

        delivery = await eventually(given_up)
        assert (delivery.attempt_count, delivery.http_status, delivery.event_count) == (3, 404, 1)
        failing = await scheduler.webhooks.GetWebhook(
            GetWebhookRequest(webhook_id=webhook.webhook_id)
        )
        assert failing.HasField("failing_since_time")
        assert failing.last_error == "127.0.0.1 answered 404"
        assert failing.secret == ""
        answer = await scheduler.webhooks.RedeliverWebhook(
            RedeliverWebhookRequest(webhook_id=webhook.webhook_id)
        )
        assert answer.redelivered_count == 1

        async def redelivered() -> bool:
            await end_rests(scheduler)
            return len(receiver.posts) == 4

        await eventually(redelivered)
        # The same message each time, by which a receiver recognises it.
        assert {post.headers["webhook-id"] for post in receiver.posts} == {delivery.message_id}
        assert len({str(post.events()) for post in receiver.posts}) == 1

        async def forgotten() -> bool:
            return not (await scheduler.webhooks.ListWebhookDeliveries(listed)).webhook_deliveries

        await eventually(forgotten)
        healthy = await scheduler.webhooks.GetWebhook(
            GetWebhookRequest(webhook_id=webhook.webhook_id)
        )
        assert (healthy.last_error, healthy.HasField("failing_since_time")) == ("", False)


async def test_a_server_that_hangs_delays_no_other_user(scheduler: Scheduler) -> None:
    async with receiving() as slow, receiving() as quick:
        slow.hang = asyncio.Event()
        for _ in range(5):
            await create(scheduler, slow.url, "mallory")
        await create(scheduler, quick.url, "ann")
        await scheduler.schedule(await scheduler.sender("mallory"))
        await eventually(lambda: len(slow.posts) == 2)
        await scheduler.schedule(await scheduler.sender("ann"))
        await eventually(lambda: len(quick.posts) == 1)
        # Of one user, only two requests are under way.
        assert len(slow.posts) == 2
        slow.hang.set()


async def test_slow_webhooks_do_not_keep_the_places_of_later_ones(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook_delivery, "_AT_ONCE", 4)
    async with receiving() as slow, receiving() as quick:
        for user in ("eve", "eve", "mallory", "mallory"):
            await create(scheduler, slow.url, user)
        await create(scheduler, quick.url, "ann")
        slow.hang = asyncio.Event()
        for user in ("eve", "mallory"):
            await scheduler.schedule(await scheduler.sender(user))
        await eventually(lambda: len(slow.posts) == 4)
        await scheduler.schedule(await scheduler.sender("ann"))

        def posted(count: int) -> bool:
            return bool(quick.posts) or len(slow.posts) == count

        for done in (4, 8, 12):
            # All places are taken, and the four have more events before their requests end.
            await eventually(partial(posted, done))
            await change(scheduler, "UPDATE email_jobs SET scheduled_at = now() + interval '1 d'")
            ended, slow.hang = slow.hang, asyncio.Event()
            ended.set()
        slow.hang.set()
        assert quick.posts


async def test_a_webhook_gets_what_is_committed_after_it_was_created(scheduler: Scheduler) -> None:
    async with receiving() as receiver:
        await scheduler.schedule(await scheduler.sender())
        url = scheduler.settings.database_url
        async with await psycopg.AsyncConnection.connect(url) as other:
            # It draws the id of its event before.
            await other.execute("UPDATE email_jobs SET scheduled_at = '2031-01-01Z'")
            await create(scheduler, receiver.url)
        await eventually(
            lambda: any(
                event.get("schedule_time", "").startswith("2031") for event in receiver.job_events()
            )
        )


async def test_a_webhook_that_is_disabled_during_a_request_stays_disabled(
    scheduler: Scheduler,
) -> None:
    async with receiving("500 No") as receiver:
        receiver.hang = asyncio.Event()
        webhook = await create(scheduler, receiver.url)
        await scheduler.schedule(await scheduler.sender())
        await eventually(lambda: len(receiver.posts) == 1)
        disabled = Webhook(webhook_id=webhook.webhook_id, disabled=True)
        await scheduler.webhooks.UpdateWebhook(
            UpdateWebhookRequest(webhook=disabled, update_mask=FieldMask(paths=["disabled"]))
        )
        receiver.hang.set()
        get = GetWebhookRequest(webhook_id=webhook.webhook_id)

        async def failed() -> bool:
            return bool((await scheduler.webhooks.GetWebhook(get)).last_error)

        await eventually(failed)
        assert (await scheduler.webhooks.GetWebhook(get)).disabled


@pytest.mark.parametrize("call", ["RedeliverWebhook", "UpdateWebhook"])
@pytest.mark.parametrize("backoff", ["1h"])
async def test_one_request_of_a_webhook_is_under_way_at_a_time(
    scheduler: Scheduler, call: str
) -> None:
    async with receiving("500 No") as receiver, receiving() as other:
        webhook = await create(scheduler, receiver.url)
        await create(scheduler, other.url, "bert")
        sender = await scheduler.sender()
        await scheduler.schedule(sender)
        await eventually(lambda: scheduler.value("SELECT count(*) FROM webhook_deliveries") == 1)
        receiver.hang = asyncio.Event()
        await change(scheduler, "UPDATE webhook_deliveries SET next_at = NULL")
        await scheduler.schedule(sender)
        await change(scheduler, "UPDATE webhooks SET next_at = now() WHERE failures > 0")
        await eventually(lambda: len(receiver.posts) == 2)
        if call == "RedeliverWebhook":
            await scheduler.webhooks.RedeliverWebhook(
                RedeliverWebhookRequest(webhook_id=webhook.webhook_id)
            )
        else:
            await change(scheduler, "UPDATE webhook_deliveries SET next_at = now()")
            await scheduler.webhooks.UpdateWebhook(
                UpdateWebhookRequest(
                    webhook=Webhook(webhook_id=webhook.webhook_id),
                    update_mask=FieldMask(paths=["disabled"]),
                )
            )
        # Once this is posted, the worker has looked at all webhooks.
        await scheduler.schedule(await scheduler.sender("bert"))
        await eventually(lambda: len(other.posts) == 1)
        assert len(receiver.posts) == 2
        receiver.hang.set()
        # The end of the request looks again.
        await eventually(lambda: len(receiver.posts) == 3)
        failed, _, again = (post.headers["webhook-id"] for post in receiver.posts)
        assert again == failed


async def test_a_webhook_ends_with_410_and_after_days_of_failures(scheduler: Scheduler) -> None:
    async with receiving("410 Gone") as receiver:
        webhook = await create(scheduler, receiver.url)
        sender = await scheduler.sender()
        await scheduler.schedule(sender)

        async def is_disabled() -> bool:
            request = GetWebhookRequest(webhook_id=webhook.webhook_id)
            return (await scheduler.webhooks.GetWebhook(request)).disabled

        await eventually(is_disabled)
        await scheduler.schedule(sender)
        enabled = await scheduler.webhooks.UpdateWebhook(
            UpdateWebhookRequest(
                webhook=Webhook(webhook_id=webhook.webhook_id),
                update_mask=FieldMask(paths=["disabled"]),
            )
        )
        assert not enabled.disabled
        # What was missed follows, and the delivery that failed.
        await eventually(lambda: len(receiver.job_events()) == 3)
        await eventually(lambda: scheduler.value("SELECT next_at <= now() FROM webhooks"))
        receiver.answers = ["500 No"]
        await change(scheduler, "UPDATE webhooks SET failing_since = now() - interval '6 days'")
        await scheduler.schedule(sender)
        await eventually(is_disabled)


async def test_a_process_that_died_in_a_request_leaves_the_events_to_another(
    scheduler: Scheduler,
) -> None:
    async with receiving() as receiver:
        await create(scheduler, receiver.url)
        # As after kill -9: the lease is held, and nobody works.
        await change(scheduler, "UPDATE webhooks SET next_at = now() + interval '1 hour'")
        await scheduler.schedule(await scheduler.sender())
        await change(scheduler, "UPDATE webhooks SET next_at = now() + interval '1 s'")
        await eventually(lambda: len(receiver.job_events()) == 1)


async def test_webhooks_are_managed_and_their_secrets_are_stored_encrypted(
    scheduler: Scheduler,
) -> None:
    async with receiving() as receiver:
        request = CreateWebhookRequest(
            user_id="ann", request_id="one", webhook=Webhook(url=receiver.url)
        )
        webhook = await scheduler.webhooks.CreateWebhook(request)
        assert await scheduler.webhooks.CreateWebhook(request) == webhook
        stored = scheduler.value("SELECT secret FROM webhooks")
        answer = scheduler.value("SELECT answer FROM change_requests")
        assert webhook.secret.encode() not in stored + answer
        tested = await scheduler.webhooks.TestWebhook(TryRequest(webhook_id=webhook.webhook_id))
        assert (tested.delivered, tested.http_status) == (True, 204)
        assert receiver.posts[0].content["type"] == "webhook.test"
        receiver.answers = ["503 Busy"]
        tested = await scheduler.webhooks.TestWebhook(TryRequest(webhook_id=webhook.webhook_id))
        assert (tested.delivered, tested.http_status) == (False, 503)
    for _ in range(19):
        await create(scheduler, "https://example.com/hook")
    refusal = await refusal_of(create(scheduler, "https://example.com/hook"))
    assert (refusal.code, refusal.reason) == ("RESOURCE_EXHAUSTED", "USER_WEBHOOKS_EXCEEDED")
    listed = await scheduler.webhooks.ListWebhooks(ListWebhooksRequest(user_id="ann"))
    assert len(listed.webhooks) == 20
    changed = await scheduler.webhooks.UpdateWebhook(
        UpdateWebhookRequest(
            webhook=Webhook(
                webhook_id=webhook.webhook_id,
                url="https://example.org",
                states=[EMAIL_JOB_STATE_SENT],
            ),
        )
    )
    assert (changed.url, list(changed.states)) == ("https://example.org", [EMAIL_JOB_STATE_SENT])
    refusal = await refusal_of(
        scheduler.webhooks.DeleteWebhook(
            DeleteWebhookRequest(webhook_id=webhook.webhook_id, etag=webhook.etag)
        )
    )
    assert refusal.reason == "ETAG_MISMATCH"
    await scheduler.webhooks.DeleteWebhook(DeleteWebhookRequest(webhook_id=webhook.webhook_id))
    refusal = await refusal_of(
        scheduler.webhooks.GetWebhook(GetWebhookRequest(webhook_id=webhook.webhook_id))
    )
    assert refusal.reason == "WEBHOOK_NOT_FOUND"
    actions = [row[0] for row in scheduler.rows("SELECT action FROM audit_events ORDER BY id")]
    assert actions.count("CreateWebhook") == 20
    assert actions[-2:] == ["UpdateWebhook", "DeleteWebhook"]


LISTED = Egress(["127.0.0.0/8"]).lists
WRONG_URLS = (
    "",
    "example.com",
    "ftp://example.com",
    "http://example.com",
    "https://ann:x@example.com",
    "https://example.com/#a",
    "https://example.com:25",
    "https://example.com:99999",
    "https:///path",
    "https://ex\u00e4mple.com",
    "https://example.com/" + "x" * 2_048,
)


def test_only_https_urls_are_accepted() -> None:
    for url in WRONG_URLS:
        with pytest.raises(InvalidInput):
            check_url("url", url, LISTED)
    for url in ("https://example.com/a?b", "https://example.com:8443", "http://127.0.0.1:80/x"):
        assert check_url("url", url, LISTED) == url


async def test_an_address_of_the_operators_network_is_not_reached(scheduler: Scheduler) -> None:
    for url in ("https://10.0.0.1/", "https://[::1]:8443/", "https://169.254.169.254/latest"):
        webhook = await create(scheduler, url)
        request = TryRequest(webhook_id=webhook.webhook_id)
        tested = await scheduler.webhooks.TestWebhook(request)
        assert not tested.delivered
        assert "is not permitted" in tested.failure
