"""Who asks by a request for a change, and why: the fields that the requests of all changes have."""

from __future__ import annotations

from typing import Any, Protocol

from google.protobuf.message import Message

from outbox_server.shared import bounds
from outbox_server.shared.callers import current_caller
from outbox_server.shared.database.audit_events import RecordedChange
from outbox_server.shared.errors import Violations


class AttributedRequest(Protocol):
    """The fields that the requests of all changes have. Some have no `request_id`."""

    identity: str
    reason: str


def check_origin(request: AttributedRequest) -> None:
    """Check `request_id`, `identity` and `reason`, to report them with other wrong fields.

    Raises:
        InvalidInput: REQUEST_ID_INVALID, IDENTITY_INVALID, CHANGE_REASON_INVALID.
    """
    # A change that is idempotent without one has no such field.
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
