"""The fields of a webhook that callers set, and their checks."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Final

from outbox.v1 import webhook_pb2, webhook_service_pb2

from outbox_server.services.scheduler.servicers.calls import check_mask
from outbox_server.services.scheduler.storage.webhooks import WebhookRecord
from outbox_server.shared import bounds
from outbox_server.shared.durations import format_duration
from outbox_server.shared.errors import InvalidInput
from outbox_server.shared.rpc.proto_mapping import from_duration
from outbox_server.shared.states import requested_states

_FIELDS: Final = ("url", "states", "disabled")
# How long the old secret stays in use after a rotation, if the call does not say.
_OLD_SECRET_DURATION: Final = timedelta(hours=24)


def masked_fields(request: webhook_service_pb2.UpdateWebhookRequest) -> Iterator[str]:
    """Yield the fields to change.

    Raises:
        InvalidInput: UPDATE_MASK_INVALID.
    """
    paths = list(request.update_mask.paths)
    if not paths:
        yield from (name for name in _FIELDS if getattr(request.webhook, name))
        return
    check_mask(paths, ("*", *_FIELDS), lambda _: f"use {', '.join(_FIELDS)}, or * for all of them")
    for path in paths:
        if path == "*":
            yield from _FIELDS
        else:
            yield path


def differing(present: WebhookRecord, values: dict[str, Any]) -> dict[str, Any]:
    """Return the values that the webhook does not have yet.

    A webhook that is not disabled, but rests after failures, is enabled again.
    """
    same = {
        "url": present.url,
        "states": sorted(int(state) for state in present.states),
        "disabled": None if present.failing_since else present.disabled,
    }
    return {name: value for name, value in values.items() if value != same[name]}


def wanted_states(asked: webhook_pb2.Webhook) -> list[int]:
    """Return the states whose changes are posted.

    Raises:
        InvalidInput: some numbers belong to no state.
    """
    return sorted(map(int, requested_states(asked.states, "webhook.states")))


def old_secret_duration(request: webhook_service_pb2.RotateWebhookSecretRequest) -> timedelta:
    """Return how long requests are also signed with the old secret.

    Raises:
        InvalidInput: OLD_SECRET_DURATION_INVALID.
    """
    if not request.HasField("old_secret_duration"):
        return _OLD_SECRET_DURATION
    keep = from_duration(request.old_secret_duration, "old_secret_duration")
    if not timedelta(0) <= keep <= bounds.MAX_OLD_SECRET_DURATION:
        raise InvalidInput.field(
            "old_secret_duration",
            f"must be 0 to {format_duration(bounds.MAX_OLD_SECRET_DURATION)}"
            f" (got {keep.total_seconds():g} s); unset means"
            f" {format_duration(_OLD_SECRET_DURATION)}",
            reason="OLD_SECRET_DURATION_INVALID",
        )
    return keep
