"""Turns the rows of webhooks and of their failed deliveries into messages."""

from __future__ import annotations

from typing import Any

from outbox.v1 import email_job_pb2, webhook_pb2

from outbox_server.services.scheduler.storage.webhook_deliveries import DeliveryRecord
from outbox_server.services.scheduler.storage.webhooks import WebhookRecord
from outbox_server.services.scheduler.webhooks import message_id
from outbox_server.shared.rpc.proto_mapping import id_text, to_timestamp


def to_webhook(record: WebhookRecord) -> webhook_pb2.Webhook:
    """Return the message of a webhook, without its secret."""
    webhook = webhook_pb2.Webhook(
        webhook_id=id_text(record.webhook_id),
        user_id=record.user_id,
        url=record.url,
        sender_id="" if record.sender_id is None else id_text(record.sender_id),
        states=[
            email_job_pb2.EmailJobState.Value(f"EMAIL_JOB_STATE_{state.name}")
            for state in sorted(record.states)
        ],
        disabled=record.disabled,
        create_time=to_timestamp(record.created_at),
        last_error=record.error or "",
        etag=str(record.revision),
    )
    if record.old_secret_until is not None:
        webhook.old_secret_expire_time.CopyFrom(to_timestamp(record.old_secret_until))
    if record.failing_since is not None:
        webhook.failing_since_time.CopyFrom(to_timestamp(record.failing_since))
    return webhook


def to_delivery(record: DeliveryRecord) -> webhook_pb2.WebhookDelivery:
    """Return the message of a failed delivery."""
    waits = record.next_at is not None
    delivery = webhook_pb2.WebhookDelivery(
        webhook_delivery_id=id_text(record.delivery_id),
        webhook_id=id_text(record.webhook_id),
        message_id=message_id(record.webhook_id, record.after_event, record.last_event),
        state=webhook_pb2.WEBHOOK_DELIVERY_STATE_PENDING
        if waits
        else webhook_pb2.WEBHOOK_DELIVERY_STATE_FAILED,
        event_count=record.event_count,
        attempt_count=record.attempts,
        create_time=to_timestamp(record.created_at),
        http_status=record.http_status or 0,
        last_error=record.error,
    )
    if record.next_at is not None:
        delivery.next_attempt_time.CopyFrom(to_timestamp(record.next_at))
    return delivery


def audited_webhook(record: WebhookRecord) -> dict[str, Any]:
    """Return the values of a webhook that the audit log keeps."""
    return {
        "url": record.url,
        "states": [state.name for state in sorted(record.states)],
        "disabled": record.disabled,
    }


def webhook_target(record: WebhookRecord) -> str:
    """Return the name of a webhook in the audit log."""
    return f"webhooks/{record.webhook_id}"
