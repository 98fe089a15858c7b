"""The fields that the requests of all changes have: their id, who asks for the change, and why."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any, Protocol

from google.protobuf.message import Message

from outbox_server.shared import bounds
from outbox_server.shared.callers import current_caller
from outbox_server.shared.database.audit_events import RecordedChange
from outbox_server.shared.errors import AlreadyExists, Violations


class AttributedRequest(Protocol):
    """The fields that the requests of all changes have; the id of a batch is in its options."""

    identity: str
    reason: str


def check_origin(request: AttributedRequest) -> None:
    """Check `request_id`, `identity` and `reason`, to report them with other wrong fields.

    Raises:
        InvalidInput: REQUEST_ID_INVALID, IDENTITY_INVALID, CHANGE_REASON_INVALID.
    """
    # A request that creates a batch has its `request_id` in its options.
    request_id = getattr(request, "request_id", "")
    wrong = Violations()
    with wrong:
        if request_id:
            bounds.REQUEST_ID.check("request_id", request_id)
    with wrong:
        bounds.IDENTITY.check("identity", request.identity)
    with wrong:
        bounds.CHANGE_REASON.check("reason", request.reason)
    wrong.raise_any()


def requested_change(request: Message) -> RecordedChange:
    """Return who asks by `request` for what, and why; what changes is not known yet.

    Raises:
        InvalidInput: REQUEST_ID_INVALID, IDENTITY_INVALID, CHANGE_REASON_INVALID.
    """
    given: Any = request
    check_origin(given)
    caller = current_caller()
    return RecordedChange(
        actor=caller.kind.value if caller.key_id is None else f"key:{caller.key_id}",
        action=request.DESCRIPTOR.name.removesuffix("Request"),
        identity=given.identity,
        reason=given.reason,
    )


def request_digest(request: Message, key: bytes, place: str = "") -> bytes:
    """Return the digest by which a repeated request is told from another one with the same id.

    It has 32 bytes, and is keyed with `key`, because a request may contain a password. `place`
    names the process that changes, if that belongs to what is asked for.
    """
    name = request.DESCRIPTOR.full_name.encode() + place.encode()
    content = request.SerializeToString(deterministic=True)
    return blake2b(name + b"\0" + content, key=key, digest_size=32).digest()


def reused(request_id: str) -> AlreadyExists:
    """Return the error for the id of another request (REQUEST_ID_REUSED)."""
    return AlreadyExists(
        f"request_id {request_id!r} was used for another request; use a new one",
        reason="REQUEST_ID_REUSED",
        metadata={"request_id": request_id},
    )
