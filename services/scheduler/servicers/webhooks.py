"""Implements WebhookService."""

from __future__ import annotations

import secrets as random
from collections.abc import Callable
from typing import Any, Final

from google.protobuf.empty_pb2 import Empty
from outbox.v1 import webhook_pb2, webhook_service_pb2, webhook_service_pb2_grpc
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.services.scheduler.changes import (
    Changes,
    Made,
    check_etag,
    differences,
)
from outbox_server.services.scheduler.servicers.calls import (
    Context,
    acting_user,
    named_user,
)
from outbox_server.services.scheduler.servicers.webhook_fields import (
    differing,
    masked_fields,
    old_secret_duration,
    wanted_states,
)
from outbox_server.services.scheduler.servicers.webhook_mapping import (
    audited_webhook,
    to_delivery,
    to_webhook,
    webhook_target,
)
from outbox_server.services.scheduler.storage import webhook_deliveries
from outbox_server.services.scheduler.storage import webhooks as storage
from outbox_server.services.scheduler.storage.senders import read_sender
from outbox_server.services.scheduler.storage.webhooks import WebhookRecord
from outbox_server.services.scheduler.webhook_posts import WebhookMessage, WebhookPoster
from outbox_server.services.scheduler.webhooks import new_secret
from outbox_server.shared.durations import format_duration
from outbox_server.shared.errors import InvalidInput, Violations
from outbox_server.shared.fair_shares import FairShares
from outbox_server.shared.filters.resources import (
    DELIVERY_FIELDS,
    DELIVERY_ORDERS,
    WEBHOOK_FIELDS,
    WEBHOOK_ORDERS,
    checked_list,
)
from outbox_server.shared.id_source import IdSource
from outbox_server.shared.rpc.page_tokens import MAX_ID
from outbox_server.shared.rpc.paging import requested_page
from outbox_server.shared.rpc.proto_mapping import id_text, not_found, parse_id
from outbox_server.shared.secrets import SecretBox
from outbox_server.shared.user_quotas import UserQuotas

_TESTS_AT_ONCE: Final = 8
_TESTS_WAITING: Final = 100


class WebhookServicer(webhook_service_pb2_grpc.WebhookServiceServicer):
    """Manages webhooks."""

    def __init__(
        self,
        engine: AsyncEngine,
        secrets: SecretBox,
        poster: WebhookPoster,
        changes: Changes,
        *,
        quotas: UserQuotas,
        ids: IdSource,
        wake: Callable[[], None],
    ) -> None:
        """`quotas` are the defaults. `wake` lets the worker of this process look for work."""
        self._engine = engine
        self._secrets = secrets
        self._poster = poster
        self._changes = changes
        self._quotas = quotas
        self._ids = ids
        self._wake = wake
        # TestWebhook waits for a server of the user's.
        self.shares = FairShares("webhook tests", _TESTS_AT_ONCE, waiting=_TESTS_WAITING)

    async def CreateWebhook(
        self,
        request: webhook_service_pb2.CreateWebhookRequest,
        context: Context,
    ) -> webhook_pb2.Webhook:
        """Create a webhook, and return its secret."""
        asked = request.webhook
        sender_id = parse_id(asked.sender_id, "webhook.sender_id") if asked.sender_id else None
        wrong = Violations()
        user_id = wrong.value(lambda: named_user(request.user_id), "")
        values = {
            "url": wrong.value(lambda: self._poster.check_url("webhook.url", asked.url), ""),
            "states": wrong.value(lambda: wanted_states(asked), list[int]()),
            "disabled": asked.disabled,
            "sender_id": sender_id,
        }
        wrong.raise_any()

        async def create(connection: AsyncConnection) -> Made[webhook_pb2.Webhook]:
            if sender_id and await read_sender(connection, sender_id, user_id) is None:
                raise not_found("webhook.sender_id", asked.sender_id)
            created = await storage.insert_webhook(
                connection,
                self._ids.issue(),
                user_id,
                values | {"secret": self._secrets.encrypt(new_secret())},
                self._quotas,
            )
            return _made(created, after=audited_webhook(created), wake=self._wake)

        answer = await self._changes.make(request, user_id, webhook_pb2.Webhook, create)
        return await self._with_secret(answer, user_id)

    async def _with_secret(
        self, answer: webhook_pb2.Webhook, user_id: str | None
    ) -> webhook_pb2.Webhook:
        """Return the answer with the present secret, which is not stored for a repeated call."""
        async with self._engine.connect() as connection:
            found = await self._found(connection, answer.webhook_id, user_id)
        answer.secret = self._secrets.decrypt(found.secret)
        return answer

    async def GetWebhook(
        self,
        request: webhook_service_pb2.GetWebhookRequest,
        context: Context,
    ) -> webhook_pb2.Webhook:
        """Return one webhook."""
        user_id = acting_user(request.user_id)
        async with self._engine.connect() as connection:
            return to_webhook(await self._found(connection, request.webhook_id, user_id))

    async def ListWebhooks(
        self,
        request: webhook_service_pb2.ListWebhooksRequest,
        context: Context,
    ) -> webhook_service_pb2.ListWebhooksResponse:
        """Return one page of a user's webhooks."""
        wrong = Violations()
        user_id = wrong.value(lambda: named_user(request.user_id), "")
        tree, descending = checked_list(request, WEBHOOK_FIELDS, WEBHOOK_ORDERS, wrong)
        wrong.raise_any()
        page = requested_page(request, "webhooks", user_id, start=(MAX_ID if descending else 0,))
        async with self._engine.connect() as connection:
            found, reached = await storage.list_webhooks(
                connection, user_id, tree, *page.after, page.limit, descending=descending
            )
        shown, token = page.cut(
            found, lambda one: (one.webhook_id,), None if reached is None else (reached,)
        )
        return webhook_service_pb2.ListWebhooksResponse(
            webhooks=map(to_webhook, shown), next_page_token=token
        )

    async def UpdateWebhook(
        self,
        request: webhook_service_pb2.UpdateWebhookRequest,
        context: Context,
    ) -> webhook_pb2.Webhook:
        """Change some fields of a webhook."""
        asked = request.webhook
        wrong = Violations()
        user_id = wrong.value(lambda: acting_user(request.user_id), None)
        webhook_id = wrong.value(lambda: parse_id(asked.webhook_id, "webhook.webhook_id"), 0)
        asked_values = wrong.value(lambda: self._values(request), dict[str, Any]())
        wrong.raise_any()

        async def update(connection: AsyncConnection) -> Made[webhook_pb2.Webhook]:
            before = await self._found(
                connection, asked.webhook_id, user_id, field="webhook.webhook_id", lock=True
            )
            check_etag(asked.etag, str(before.revision), "this webhook")
            await _check_sender(connection, asked.sender_id, before)
            values = differing(before, asked_values)
            if not values:
                return _made(before, changed=False)
            after = await storage.update_webhook(connection, webhook_id, user_id, values)
            was, now = differences(audited_webhook(before), audited_webhook(after))
            return _made(after, before=was, after=now, wake=self._wake)

        return await self._changes.make(request, user_id, webhook_pb2.Webhook, update)

    async def RotateWebhookSecret(
        self,
        request: webhook_service_pb2.RotateWebhookSecretRequest,
        context: Context,
    ) -> webhook_pb2.Webhook:
        """Replace the secret of a webhook, and return the new one."""
        keep = old_secret_duration(request)
        user_id = acting_user(request.user_id)

        async def rotate(connection: AsyncConnection) -> Made[webhook_pb2.Webhook]:
            before = await self._found(connection, request.webhook_id, user_id, lock=True)
            check_etag(request.etag, str(before.revision), "this webhook")
            rotated = await storage.rotate_secret(
                connection,
                before.webhook_id,
                user_id,
                self._secrets.encrypt(new_secret()),
                keep,
            )
            return _made(rotated, after={"old_secret_duration": format_duration(keep)})

        answer = await self._changes.make(request, user_id, webhook_pb2.Webhook, rotate)
        return await self._with_secret(answer, user_id)

    async def DeleteWebhook(
        self,
        request: webhook_service_pb2.DeleteWebhookRequest,
        context: Context,
    ) -> Empty:
        """Delete a webhook, with its failed deliveries."""
        user_id = acting_user(request.user_id)

        async def remove(connection: AsyncConnection) -> Made[Empty]:
            before = await self._found(connection, request.webhook_id, user_id, lock=True)
            check_etag(request.etag, str(before.revision), "this webhook")
            await storage.delete_webhook(connection, before.webhook_id, user_id)
            return Made(
                Empty(), webhook_target(before), before.user_id, before=audited_webhook(before)
            )

        return await self._changes.make(request, user_id, Empty, remove)

    async def TestWebhook(
        self,
        request: webhook_service_pb2.TestWebhookRequest,
        context: Context,
    ) -> webhook_service_pb2.TestWebhookResponse:
        """Post a test message, and return what came back."""
        user_id = acting_user(request.user_id)

        async def test() -> Made[webhook_service_pb2.TestWebhookResponse]:
            async with self._engine.connect() as connection:
                webhook = await self._found(connection, request.webhook_id, user_id)
            result = await self._poster.post(
                WebhookMessage(
                    url=webhook.url,
                    message_id=f"msg_test_{random.token_hex(12)}",
                    kind="webhook.test",
                    data={"webhook_id": id_text(webhook.webhook_id)},
                    user_id=webhook.user_id,
                    secrets=webhook.secrets(self._secrets),
                )
            )
            answer = webhook_service_pb2.TestWebhookResponse(
                delivered=not result.error,
                http_status=result.http_status or 0,
                failure=result.error,
            )
            return Made(
                answer,
                webhook_target(webhook),
                webhook.user_id,
                after={"delivered": answer.delivered, "http_status": answer.http_status},
            )

        return await self._changes.make_in_parts(
            request, user_id, webhook_service_pb2.TestWebhookResponse, test
        )

    async def ListWebhookDeliveries(
        self,
        request: webhook_service_pb2.ListWebhookDeliveriesRequest,
        context: Context,
    ) -> webhook_service_pb2.ListWebhookDeliveriesResponse:
        """Return one page of the failed deliveries of a webhook."""
        wrong = Violations()
        user_id = wrong.value(lambda: acting_user(request.user_id), None)
        tree, descending = checked_list(request, DELIVERY_FIELDS, DELIVERY_ORDERS, wrong)
        wrong.raise_any()
        start = (MAX_ID if descending else 0,)
        page = requested_page(
            request, "webhook_deliveries", user_id, request.webhook_id, start=start
        )
        async with self._engine.connect() as connection:
            webhook = await self._found(connection, request.webhook_id, user_id)
            found, reached = await webhook_deliveries.list_deliveries(
                connection,
                webhook.webhook_id,
                tree,
                *page.after,
                page.limit,
                descending=descending,
            )
        shown, token = page.cut(
            found, lambda one: (one.delivery_id,), None if reached is None else (reached,)
        )
        return webhook_service_pb2.ListWebhookDeliveriesResponse(
            webhook_deliveries=map(to_delivery, shown), next_page_token=token
        )

    async def RedeliverWebhook(
        self,
        request: webhook_service_pb2.RedeliverWebhookRequest,
        context: Context,
    ) -> webhook_service_pb2.RedeliverWebhookResponse:
        """Try deliveries again from now on."""
        user_id = acting_user(request.user_id)
        one = request.webhook_delivery_id
        delivery_id = parse_id(one, "webhook_delivery_id") if one else None

        async def redeliver(
            connection: AsyncConnection,
        ) -> Made[webhook_service_pb2.RedeliverWebhookResponse]:
            webhook = await self._found(connection, request.webhook_id, user_id, lock=True)
            count = await webhook_deliveries.redeliver(connection, webhook.webhook_id, delivery_id)
            if one and not count:
                raise not_found("webhook_delivery_id", one)

            async def afterwards() -> None:
                self._wake()

            return Made(
                webhook_service_pb2.RedeliverWebhookResponse(redelivered_count=count),
                webhook_target(webhook),
                webhook.user_id,
                after={"redelivered_count": count},
                changed=bool(count),
                afterwards=afterwards,
            )

        return await self._changes.make(
            request, user_id, webhook_service_pb2.RedeliverWebhookResponse, redeliver
        )

    def _values(self, request: webhook_service_pb2.UpdateWebhookRequest) -> dict[str, Any]:
        asked = request.webhook
        values: dict[str, Any] = {}
        wrong = Violations()
        for name in wrong.value(lambda: tuple(masked_fields(request)), ()):
            with wrong:
                match name:
                    case "url":
                        values[name] = self._poster.check_url("webhook.url", asked.url)
                    case "states":
                        values[name] = wanted_states(asked)
                    case "disabled":
                        values[name] = asked.disabled
        wrong.raise_any()
        return values

    async def _found(
        self,
        connection: AsyncConnection,
        text: str,
        user_id: str | None,
        *,
        field: str = "webhook_id",
        lock: bool = False,
    ) -> WebhookRecord:
        webhook_id = parse_id(text, field)
        found = await storage.read_webhook(connection, webhook_id, user_id, lock=lock)
        if found is None:
            raise not_found(field, text)
        return found


async def _check_sender(connection: AsyncConnection, asked: str, present: WebhookRecord) -> None:
    """Check that a request names no other sender than the webhook has.

    Raises:
        NotFound: SENDER_NOT_FOUND.
        InvalidInput: UPDATE_MASK_INVALID.
    """
    if not asked or asked == str(present.sender_id):
        return
    sender_id = parse_id(asked, "webhook.sender_id")
    if await read_sender(connection, sender_id, present.user_id) is None:
        raise not_found("webhook.sender_id", asked)
    raise InvalidInput.field(
        "webhook.sender_id",
        "cannot be changed; create another webhook",
        reason="UPDATE_MASK_INVALID",
    )


def _made(
    record: WebhookRecord,
    *,
    before: Any = None,
    after: Any = None,
    changed: bool = True,
    wake: Callable[[], None] = lambda: None,
) -> Made[webhook_pb2.Webhook]:
    async def afterwards() -> None:
        wake()

    return Made(
        to_webhook(record),
        webhook_target(record),
        record.user_id,
        before=before,
        after=after,
        changed=changed,
        afterwards=afterwards,
    )
