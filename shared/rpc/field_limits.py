"""The limit of each string, bytes, list and map of all requests, checked before anything reads it.

The interceptor of all calls checks every message with `check_fields`. The time is proportional to
the number of fields that are set. A test compares the table with the contract: a new field needs an
entry here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any, Final

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from outbox_server.shared import bounds
from outbox_server.shared.bounds import TextBounds
from outbox_server.shared.errors import InvalidInput, OutboxError, ResourceExhausted, Violations
from outbox_server.shared.message_size import utf8_size


class LimitUnit(Enum):
    """The unit that a limit counts."""

    CHARACTERS = "characters"
    BYTES = "bytes"
    ENTRIES = "entries"


@dataclass(frozen=True, slots=True)
class FieldLimit:
    """The maximum size of a field, and the error if it is larger."""

    most: int
    reason: str
    unit: LimitUnit = LimitUnit.CHARACTERS
    # For a list or map of texts: the limit of each text.
    each: FieldLimit | None = None
    # Whether the limit applies to one row: then the row is rejected, not the request.
    by_row: bool = False
    # Whether the error is RESOURCE_EXHAUSTED, as for a message that is too large.
    exhausted: bool = False
    hint: str = ""

    def error(self, path: str, got: int, *, at_least: bool = False) -> OutboxError:
        """Return the error for the field at `path`, which has `got` units (`at_least`: or more)."""
        has = f"at least {got:,}" if at_least else f"{got:,}"
        wrong = f"must have at most {self.most:,} {self.unit.value} (got {has}){self.hint}"
        if self.exhausted:
            return ResourceExhausted(f"{path}: {wrong}", reason=self.reason)
        return InvalidInput.field(path, wrong, reason=self.reason)


def _text(limit: TextBounds) -> FieldLimit:
    return FieldLimit(limit.most, limit.reason)


def _bytes(most: int, reason: str) -> FieldLimit:
    return FieldLimit(most, reason, LimitUnit.BYTES)


def _entries(most: int, reason: str, each: FieldLimit | None = None) -> FieldLimit:
    return FieldLimit(most, reason, LimitUnit.ENTRIES, each)


def _file(reason: str, most: int, hint: str = "") -> FieldLimit:
    return FieldLimit(most, reason, LimitUnit.BYTES, exhausted=True, hint=hint)


def _of_row(most: int, reason: str, unit: LimitUnit = LimitUnit.CHARACTERS) -> FieldLimit:
    return FieldLimit(most, reason, unit, by_row=True)


_ID: Final = _text(bounds.ID)
_ADDRESS: Final = _text(bounds.ADDRESS)
_TEMPLATE: Final = _bytes(bounds.MAX_TEMPLATE_BYTES, "TEMPLATE_TOO_LARGE")
_HEADER_TEMPLATE: Final = _bytes(bounds.MAX_HEADER_TEMPLATE_BYTES, "TEMPLATE_TOO_LARGE")
_OUTPUT: Final = _text(bounds.OUTPUT)

# The limits of fields by name. A name has the same meaning in every message.
_BY_NAME: Final[Mapping[str, FieldLimit]] = {
    "user_id": _text(bounds.USER_ID),
    "request_id": _text(bounds.REQUEST_ID),
    "identity": _text(bounds.IDENTITY),
    "reason": _text(bounds.CHANGE_REASON),
    "etag": _text(bounds.ETAG),
    "target": _text(bounds.AUDIT_TARGET),
    "sender_id": _ID,
    "batch_id": _ID,
    "email_job_id": _ID,
    "api_key_id": _ID,
    "webhook_id": _ID,
    "webhook_delivery_id": _ID,
    "email_job_ids": _entries(bounds.MAX_RETRIED_IDS, "TOO_MANY_IDS", _ID),
    "email": _ADDRESS,
    "recipient": _ADDRESS,
    "page_token": _text(bounds.PAGE_TOKEN),
    "resume_token": _text(bounds.RESUME_TOKEN),
    "filter": _text(bounds.FILTER),
    "order_by": _text(bounds.ORDER_BY),
    "time_zone": _text(bounds.TIME_ZONE),
    "email_column": _text(bounds.EMAIL_COLUMN),
}
# The limits of all other fields, by message.
_BY_MESSAGE: Final[Mapping[str, Mapping[str, FieldLimit]]] = {
    "outbox.v1.BatchOptions": {
        "subject": _TEMPLATE,
        "body": _TEMPLATE,
        "html": _TEMPLATE,
        "reply_to": _HEADER_TEMPLATE,
        "headers": _entries(bounds.MAX_HEADERS, "TOO_MANY_HEADERS"),
        "name_column": _text(bounds.NAME_COLUMN),
        "external_id": _text(bounds.EXTERNAL_ID),
        "labels": _entries(bounds.MAX_LABELS, "LABELS_INVALID"),
        "external_id_column": _text(bounds.EXTERNAL_ID_COLUMN),
        "label_columns": _entries(
            bounds.MAX_LABELS, "LABEL_COLUMNS_INVALID", _text(bounds.LABEL_COLUMN)
        ),
    },
    "outbox.v1.BatchOptions.LabelsEntry": {
        "key": _text(bounds.LABEL_KEY),
        "value": _text(bounds.LABEL_VALUE),
    },
    "outbox.v1.MailHeader": {"name": _text(bounds.HEADER_NAME), "value": _HEADER_TEMPLATE},
    "outbox.v1.Batch": {
        "subject": _TEMPLATE,
        "body": _TEMPLATE,
        "html": _TEMPLATE,
        "reply_to": _HEADER_TEMPLATE,
        "headers": _entries(bounds.MAX_HEADERS, "TOO_MANY_HEADERS"),
        "name_column": _text(bounds.NAME_COLUMN),
        "external_id": _text(bounds.EXTERNAL_ID),
        "labels": _entries(bounds.MAX_LABELS, "LABELS_INVALID"),
    },
    "outbox.v1.Batch.LabelsEntry": {
        "key": _text(bounds.LABEL_KEY),
        "value": _text(bounds.LABEL_VALUE),
    },
    "outbox.v1.ScheduleBatchRequest": {
        "csv": _file("CSV_TOO_LARGE", bounds.MAX_CSV_BYTES, "; use UploadBatch for larger files")
    },
    "outbox.v1.PreviewBatchRequest": {
        "csv": _file(
            "CSV_TOO_LARGE", bounds.MAX_CSV_BYTES, "; a preview needs only the first rows"
        ),
        "row_numbers": _entries(bounds.MAX_PREVIEWED_ROWS, "TOO_MANY_ENTRIES"),
    },
    "outbox.v1.UploadBatchRequest": {"chunk": _file("CHUNK_TOO_LARGE", bounds.MAX_CHUNK_BYTES)},
    "google.api.HttpBody": {
        "content_type": _text(bounds.CONTENT_TYPE),
        "data": _file("CHUNK_TOO_LARGE", bounds.MAX_CHUNK_BYTES),
        "extensions": _entries(10, "TOO_MANY_ENTRIES"),
    },
    "google.protobuf.Any": {"type_url": _OUTPUT, "value": _bytes(64 * 1024, "FIELD_TOO_LONG")},
    "outbox.v1.Recipients": {"rows": _entries(bounds.MAX_ROWS, "TOO_MANY_ENTRIES")},
    "outbox.v1.Recipient": {
        "email": _of_row(bounds.MAX_ADDRESS, "ADDRESS_INVALID"),
        "columns": _of_row(bounds.MAX_COLUMNS, "TOO_MANY_COLUMNS", LimitUnit.ENTRIES),
        "external_id": _of_row(bounds.EXTERNAL_ID.most, "EXTERNAL_ID_INVALID"),
        "labels": _of_row(bounds.MAX_LABELS, "LABELS_INVALID", LimitUnit.ENTRIES),
    },
    "outbox.v1.Recipient.LabelsEntry": {
        "key": _of_row(bounds.LABEL_KEY.most, "LABELS_INVALID"),
        "value": _of_row(bounds.LABEL_VALUE.most, "LABELS_INVALID"),
    },
    "outbox.v1.Recipient.ColumnsEntry": {
        "key": _of_row(bounds.MAX_COLUMN_NAME, "COLUMN_NAME_TOO_LONG"),
        "value": _of_row(bounds.MAX_CELL, "CELL_TOO_LONG"),
    },
    "outbox.v1.ApiKey": {"display_name": _text(bounds.DISPLAY_NAME)},
    "outbox.v1.Sender": {"display_name": _text(bounds.DISPLAY_NAME)},
    "outbox.v1.SmtpEndpoint": {
        "host": _text(bounds.SMTP_HOST),
        "username": _text(bounds.SMTP_USERNAME),
        "password": _text(bounds.SMTP_PASSWORD),
        "ca_certificates": _bytes(bounds.MAX_CA_BYTES, "SMTP_ENDPOINT_INVALID"),
    },
    "outbox.v1.OAuth2Credentials": {
        "token_url": _text(bounds.OAUTH2_TOKEN_URL),
        "client_id": _text(bounds.OAUTH2_CLIENT_ID),
        "client_secret": _text(bounds.OAUTH2_CLIENT_SECRET),
        "refresh_token": _text(bounds.OAUTH2_REFRESH_TOKEN),
        "scope": _text(bounds.OAUTH2_SCOPE),
        "tenant": _text(bounds.OAUTH2_TENANT),
    },
    "outbox.v1.SendingHours": {
        "weekdays": _entries(7, "SENDING_HOURS_INVALID"),
        "start": _text(bounds.TIME_OF_DAY),
        "end": _text(bounds.TIME_OF_DAY),
    },
    "outbox.v1.Cooldown": {"enhanced_code": _OUTPUT, "message": _OUTPUT},
    "outbox.v1.EffectiveLimits": {"cooldown_cause": _OUTPUT},
    "google.protobuf.FieldMask": {
        "paths": _entries(100, "UPDATE_MASK_INVALID", _text(bounds.MASK_PATH))
    },
    "outbox.v1.User": {
        "sender_domains": _entries(
            bounds.MAX_SENDER_DOMAINS, "SENDER_DOMAIN_INVALID", _text(bounds.SENDER_DOMAIN)
        )
    },
    "outbox.v1.WatchEmailJobsRequest": {"states": _entries(10, "TOO_MANY_ENTRIES")},
    "outbox.v1.Webhook": {
        "url": _text(bounds.WEBHOOK_URL),
        "states": _entries(10, "TOO_MANY_ENTRIES"),
        "secret": _OUTPUT,
        "last_error": _OUTPUT,
    },
    "outbox.v1.Suppression": {"reason": _text(bounds.SUPPRESSION_REASON)},
    "outbox.v1.ImportSuppressionsRequest": {
        "chunk": _file("CHUNK_TOO_LARGE", bounds.MAX_CHUNK_BYTES),
        "suppression_reason": _text(bounds.SUPPRESSION_REASON),
    },
    "outbox.v1.ImportSuppressionsFileRequest": {
        "suppression_reason": _text(bounds.SUPPRESSION_REASON)
    },
    "outbox.v1.SuppressionRows": {
        "suppressions": _entries(bounds.MAX_IMPORTED_ROWS, "TOO_MANY_ENTRIES")
    },
}
# The messages of health checks and reflection, whose limits are not in the tables.
_FOREIGN: Final = _OUTPUT
_FOREIGN_ENTRIES: Final = _entries(1_000, "TOO_MANY_ENTRIES", _OUTPUT)
_OURS: Final = ("outbox.", "google.api.", "google.protobuf.")


def limit_of(field: FieldDescriptor) -> FieldLimit | None:
    """Return the limit of a field; None if it has none, because it is a number or a message.

    Raises:
        LookupError: it needs a limit, and the tables have none.
    """
    is_text = field.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)
    if not (is_text or field.is_repeated):
        return None
    kind = field.full_name.rpartition(".")[0]
    found = _BY_MESSAGE.get(kind, {}).get(field.name)
    if found is None and kind.startswith("outbox.v1."):
        found = _BY_NAME.get(field.name)
    if found is None and not kind.startswith(_OURS):
        found = _FOREIGN_ENTRIES if field.is_repeated else _FOREIGN
    if found is None:
        raise LookupError(f"{field.full_name} has no limit in {__name__}")
    return found


_Check = Callable[[str, Any], None]


def check_fields(message: Message) -> None:
    """Check the limits of all fields that are set, at any depth; rows are only counted.

    Raises:
        InvalidInput: fields have more than their limits; the error names each, and its limit.
        ResourceExhausted: CSV_TOO_LARGE, CHUNK_TOO_LARGE.
    """
    _check(message, "")


def _check(message: Message, prefix: str) -> None:
    checks = _checks_of(message.DESCRIPTOR)
    found = Violations()
    for field, value in message.ListFields():
        check = checks[field.number]
        if check is not None:
            with found:
                check(f"{prefix}{field.name}", value)
    found.raise_any()


@cache
def _checks_of(kind: Descriptor) -> Mapping[int, _Check | None]:
    """Return the check of each field, by number."""
    return {field.number: _check_of(field) for field in kind.fields}


def _check_of(field: FieldDescriptor) -> _Check | None:
    limit = limit_of(field)
    inner = field.message_type
    if limit is None:
        return None if inner is None else _check_inner
    if limit.by_row:  # checked when the row is read
        return None
    if inner is not None and inner.GetOptions().map_entry:
        return _check_map(limit, _checks_of(inner))
    if field.is_repeated:
        return _check_entries(limit, is_message=inner is not None)
    return _check_text(limit)


def _check_inner(path: str, value: Any) -> None:
    _check(value, f"{path}.")


def _check_text(limit: FieldLimit) -> _Check:
    most = limit.most
    if limit.unit is LimitUnit.BYTES:

        def check_bytes(path: str, value: Any) -> None:
            # A text has at least as many bytes as characters.
            size = len(value)
            if size <= most and isinstance(value, str):
                size = utf8_size(value)
            if size > most:
                raise limit.error(path, size)

        return check_bytes

    def check(path: str, value: Any) -> None:
        if len(value) > most:
            raise limit.error(path, len(value))

    return check


def _check_map(limit: FieldLimit, checks: Mapping[int, _Check | None]) -> _Check:
    check_key, check_value = checks[1], checks[2]

    def check(path: str, value: Any) -> None:
        if len(value) > limit.most:
            raise limit.error(path, len(value))
        for index, (key, text) in enumerate(value.items()):
            if check_key is not None:
                check_key(f"{path}[{index}].key", key)
            if check_value is not None:
                check_value(f"{path}[{index}].value", text)

    return check


def _check_entries(limit: FieldLimit, *, is_message: bool) -> _Check:
    each = None if limit.each is None else _check_text(limit.each)
    # Rows are checked one by one when they are read, in a thread: a wrong row is rejected alone.
    within = is_message and limit is not _BY_MESSAGE["outbox.v1.Recipients"]["rows"]

    def check(path: str, value: Any) -> None:
        if len(value) > limit.most:
            raise limit.error(path, len(value))
        for index, entry in enumerate(value if within or each else ()):
            where = f"{path}[{index}]"
            if within:
                _check(entry, f"{where}.")
            elif each is not None:
                each(where, entry)

    return check
