"""Completes an error about fields with what is wrong in the fields that all requests share.

A method checks its own fields, and these while it acts (the user, the ids, `request_id`). Whichever
is wrong first ends the call. So that a caller learns everything at once, the interceptor of all
calls then checks the rest of these fields, from the contract alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NoReturn

from google.api.field_behavior_pb2 import FieldBehavior, field_behavior
from google.protobuf.message import Message

from outbox_server.shared import bounds
from outbox_server.shared.errors import InvalidInput, NotFound, Violations
from outbox_server.shared.rpc import page_tokens
from outbox_server.shared.rpc.proto_mapping import from_duration, from_timestamp, parse_id

_BY_NAME: Final[Mapping[str, Callable[[str, Any], object]]] = {
    "user_id": bounds.USER_ID.check,
    "request_id": bounds.REQUEST_ID.check,
    "identity": bounds.IDENTITY.check,
    "reason": bounds.CHANGE_REASON.check,
    "page_size": lambda _, value: page_tokens.page_size(value),
    "page_token": page_tokens.check_form,
    "resume_token": page_tokens.check_form,
}
_BY_TYPE: Final[Mapping[str, Callable[[Any, str], object]]] = {
    "google.protobuf.Timestamp": from_timestamp,
    "google.protobuf.Duration": from_duration,
}


def raise_completed(error: InvalidInput | NotFound, request: Message) -> NoReturn:
    """Raise `error`, together with the violations of the common fields of the request.

    Violations are raised in place of a NotFound, because an id that is malformed does not exist.

    Only fields of the request itself are checked, not those of its resources and options.

    Raises:
        InvalidInput: with the reason of `error`, if that is one.
        NotFound: `error` itself, if nothing else is wrong.
    """
    found = Violations()
    with found:
        raise error
    violations = error.violations if isinstance(error, InvalidInput) else ()
    named = {each.field.partition("[")[0] for each in violations}
    for field in request.DESCRIPTOR.fields:
        if field.name not in named:
            with found:
                _check(field, request)
    found.raise_any()
    raise AssertionError("an error was lost")


def _check(field: Any, request: Message) -> None:
    value = getattr(request, field.name)
    if field.message_type is not None:
        check_time = _BY_TYPE.get(field.message_type.full_name)
        if check_time is not None and request.HasField(field.name):
            check_time(value, field.name)
    elif field.enum_type is not None:
        for number in value if field.is_repeated else [value]:
            _check_enum(field, number)
    elif field.name in _BY_NAME:
        if value:
            _BY_NAME[field.name](field.name, value)
    elif field.name.endswith("_id") and not value and _is_required(field):
        parse_id(value, field.name)


def _check_enum(field: Any, number: int) -> None:
    if number not in field.enum_type.values_by_number:
        # The first value of an enum means unset.
        *others, last = (value.name for value in field.enum_type.values[1:])
        wanted = f"{', '.join(others)} or {last}" if others else last
        raise InvalidInput.field(field.name, f"must be {wanted} (got {number})")


def _is_required(field: Any) -> bool:
    return FieldBehavior.REQUIRED in field.GetOptions().Extensions[field_behavior]
