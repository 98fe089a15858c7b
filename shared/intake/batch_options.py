"""Checks the options of a batch. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from outbox_server.shared import bounds
from outbox_server.shared.errors import FieldViolation, InvalidInput, Violations
from outbox_server.shared.intake.schedule_times import BadScheduleTime, check_time_zone
from outbox_server.shared.intake.tags import (
    BadTag,
    check_external_id,
    check_labels,
    is_label_key,
)
from outbox_server.shared.mail_headers import BadHeader, header_name, needs_unsubscribe
from outbox_server.shared.states import BatchMode, DuplicatePolicy
from outbox_server.shared.templates.batch import variable_name
from outbox_server.shared.templates.head import HeadTexts

_MILLISECOND: Final = timedelta(milliseconds=1)


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """The options of a batch.

    If `subject`, `body` or `html` is None, the rows have their own. If `schedule_time` is None, the
    batch begins now.
    """

    request_id: str
    sender_id: int
    subject: str | None = None
    body: str | None = None
    html: str | None = None
    schedule_time: datetime | None = None
    spacing_ms: int = 0
    duplicates: DuplicatePolicy = DuplicatePolicy.KEEP_FIRST
    mode: BatchMode = BatchMode.PERMISSIVE
    time_zone: str = "UTC"
    # None means that jobs never expire.
    expire_after_ms: int | None = None
    # None means that `spacing_ms` sets the times.
    spread_until: datetime | None = None
    # The name of the column of the addresses in the header of a CSV. Empty means to find it by its
    # name.
    email_column: str = ""
    # How many lines of a CSV are before its header.
    skip_lines: int = 0
    # A template. None means none.
    reply_to: str | None = None
    # Names and templates.
    headers: tuple[tuple[str, str], ...] = ()
    # The column of the recipients' names, as the caller wrote it. Empty means none.
    name_column: str = ""
    external_id: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    # The columns of a CSV with the ids and the labels of jobs, as the caller wrote them.
    external_id_column: str = ""
    label_columns: tuple[str, ...] = ()
    # Whether its one mail is a test, which is due at once.
    test: bool = False

    def canonical(self) -> bytes:
        """Return bytes that are equal for equal options. Unset fields count as their defaults."""
        return json.dumps(
            [
                self.sender_id,
                self.subject,
                self.body,
                self.html,
                self.schedule_time.isoformat() if self.schedule_time else None,
                self.spacing_ms,
                int(self.duplicates),
                int(self.mode),
                self.time_zone,
                self.expire_after_ms,
                # These are included only if they are set, so that batches from before these options
                # keep their digests.
                *([self.spread_until.isoformat()] if self.spread_until else []),
                *([{"email_column": self.email_column}] if self.email_column else []),
                *([{"skip_lines": self.skip_lines}] if self.skip_lines else []),
                *([{"reply_to": self.reply_to}] if self.reply_to is not None else []),
                *([{"headers": self.headers}] if self.headers else []),
                *([{"name_column": self.name_column}] if self.name_column else []),
                *([{"external_id": self.external_id}] if self.external_id else []),
                *([{"labels": sorted(self.labels.items())}] if self.labels else []),
                *([{"id_column": self.external_id_column}] if self.external_id_column else []),
                *([{"label_columns": self.label_columns}] if self.label_columns else []),
                *([{"test": True}] if self.test else []),
            ]
        ).encode()

    @property
    def template_bytes(self) -> int:
        """The total size of the templates."""
        texts = (self.subject, self.body, self.html, *self.head.sources().values())
        return sum(len((text or "").encode()) for text in texts)

    @property
    def head(self) -> HeadTexts:
        """The templates of the head of the mails."""
        return HeadTexts(self.reply_to, variable_name(self.name_column), self.headers)


def check_options(
    options: BatchOptions,
    field: str = "options",
    *,
    needs_request_id: bool = True,
    found: Violations | None = None,
) -> BatchOptions:
    """Return `options`. `field` is their path in the request.

    Templates are checked when they are parsed. Only NUL characters are refused here. `found` has
    the errors of options that could not be read; they are raised with those found here.

    Raises:
        InvalidInput: REQUEST_ID_REQUIRED, REQUEST_ID_INVALID, TEMPLATE_INVALID, SPACING_INVALID,
            EXPIRE_AFTER_INVALID, SPREAD_UNTIL_INVALID, UNKNOWN_TIME_ZONE, EMAIL_COLUMN_INVALID,
            SKIP_LINES_INVALID, HEADER_INVALID, TOO_MANY_HEADERS, NAME_COLUMN_INVALID,
            EXTERNAL_ID_INVALID, LABELS_INVALID, EXTERNAL_ID_COLUMN_INVALID, LABEL_COLUMNS_INVALID.
    """
    found = found or Violations()
    with found:
        _check_request_id(options, field, needed=needs_request_id)
    texts = {name: getattr(options, name) or "" for name in ("subject", "body", "html")}
    for name, text in (texts | options.head.sources()).items():
        with found:
            check_no_nul(f"{field}.{name}", text)
    with found:
        _check_spacing(options, field)
    with found:
        _check_expiry(options, field)
    with found:
        check_spread(options, options.schedule_time, field)
    with found:
        check_csv_options(options.email_column, options.skip_lines, f"{field}.")
    with found:
        check_header_names(options.headers, field)
    for check_tags in (_check_columns, _check_external_id, _check_labels, _check_label_columns):
        with found:
            check_tags(options, field)
    with found:
        _check_time_zone(options, field)
    found.raise_any()
    return options


def check_no_nul(field: str, text: str) -> str:
    """Return the text of a template. `field` has it.

    Raises:
        InvalidInput: TEMPLATE_INVALID: it contains a NUL.
    """
    nul = text.find("\0")
    if nul >= 0:
        raise InvalidInput.field(
            field,
            f"must not contain a NUL (got one as character {nul + 1:,})",
            reason="TEMPLATE_INVALID",
        )
    return text


def _check_request_id(options: BatchOptions, field: str, *, needed: bool) -> None:
    if options.request_id:
        bounds.REQUEST_ID.check(f"{field}.request_id", options.request_id)
    elif needed:
        raise InvalidInput.field(
            f"{field}.request_id",
            "must be set to a different text for each batch: it makes the call safe to retry",
            reason="REQUEST_ID_REQUIRED",
        )


def _check_spacing(options: BatchOptions, field: str) -> None:
    bounds.check_spacing(f"{field}.spacing", options.spacing_ms * _MILLISECOND)


def _check_expiry(options: BatchOptions, field: str) -> None:
    if options.expire_after_ms is not None:
        bounds.check_expire_after(f"{field}.expire_after", options.expire_after_ms * _MILLISECOND)


def _check_time_zone(options: BatchOptions, field: str) -> None:
    bounds.TIME_ZONE.check(f"{field}.time_zone", options.time_zone)
    try:
        check_time_zone(options.time_zone)
    except BadScheduleTime as error:
        raise InvalidInput.field(f"{field}.time_zone", error.message, reason=error.reason) from None


def check_csv_options(email_column: str, skip_lines: int, prefix: str = "") -> None:
    """Check how a CSV is to be read. `prefix` is the path before the names of the fields.

    Raises:
        InvalidInput: EMAIL_COLUMN_INVALID, SKIP_LINES_INVALID.
    """
    wrong = Violations()
    with wrong:
        bounds.EMAIL_COLUMN.check(f"{prefix}email_column", email_column)
    with wrong:
        if not 0 <= skip_lines <= bounds.MAX_SKIP_LINES:
            raise InvalidInput.field(
                f"{prefix}skip_lines",
                f"must be 0 to {bounds.MAX_SKIP_LINES:,} (got {skip_lines:,})",
                reason="SKIP_LINES_INVALID",
            )
    wrong.raise_any()


def check_header_names(headers: Sequence[tuple[str, str]], field: str) -> None:
    """Check the names of headers. Their values are checked with their templates.

    `field` is the path of what has them.

    Raises:
        InvalidInput: TOO_MANY_HEADERS, HEADER_INVALID.
    """
    if len(headers) > bounds.MAX_HEADERS:
        raise InvalidInput.field(
            f"{field}.headers",
            f"must have at most {bounds.MAX_HEADERS} entries (got {len(headers):,})",
            reason="TOO_MANY_HEADERS",
        )
    seen: set[str] = set()
    wrong = Violations()
    for place, (name, _) in enumerate(headers):
        path = f"{field}.headers[{place}].name"
        with wrong:
            bounds.HEADER_NAME.check(path, name)
            try:
                header_name(name)
            except BadHeader as error:
                raise InvalidInput.field(path, error.message, reason=error.reason) from None
            if name.lower() in seen:
                raise InvalidInput.field(
                    path, f"a mail can have only one {name}", reason="HEADER_INVALID"
                )
            seen.add(name.lower())
    wrong.raise_any()
    if needs_unsubscribe([name for name, _ in headers]):
        raise InvalidInput.field(
            f"{field}.headers",
            "List-Unsubscribe-Post needs a List-Unsubscribe with an https URI (RFC 8058)",
            reason="HEADER_INVALID",
        )


def _check_columns(options: BatchOptions, field: str) -> None:
    found = Violations()
    for name, limit in (
        ("name_column", bounds.NAME_COLUMN),
        ("external_id_column", bounds.EXTERNAL_ID_COLUMN),
    ):
        with found:
            text = limit.check(f"{field}.{name}", getattr(options, name))
            if text and not variable_name(text):
                raise InvalidInput.field(
                    f"{field}.{name}",
                    f"must have a letter or a digit (got {text!r})",
                    reason=f"{name.upper()}_INVALID",
                )
    found.raise_any()


def _check_external_id(options: BatchOptions, field: str) -> None:
    try:
        check_external_id(options.external_id)
    except BadTag as error:
        raise InvalidInput.field(
            f"{field}.external_id", error.message, reason=error.reason
        ) from None


def _check_labels(options: BatchOptions, field: str) -> None:
    try:
        check_labels(options.labels)
    except BadTag as error:
        raise InvalidInput.field(f"{field}.labels", error.message, reason=error.reason) from None


def _check_label_columns(options: BatchOptions, field: str) -> None:
    reason = bounds.LABEL_COLUMN.reason
    if len(options.label_columns) > bounds.MAX_LABELS:
        raise InvalidInput.field(
            f"{field}.label_columns",
            f"must have at most {bounds.MAX_LABELS} entries (got {len(options.label_columns):,})",
            reason=reason,
        )
    seen: set[str] = set()
    for place, column in enumerate(options.label_columns):
        path = f"{field}.label_columns[{place}]"
        key = variable_name(bounds.LABEL_COLUMN.check(path, column))
        if key in seen or not is_label_key(key):
            wrong = (
                "is there twice"
                if key in seen
                else "must have a name that is the key of a label: a lower-case letter, then at "
                f"most {bounds.LABEL_KEY.most - 1} lower-case letters, digits and `_`"
            )
            raise InvalidInput.field(path, f"{wrong} (got {key!r})", reason=reason)
        seen.add(key)


def check_spread(options: BatchOptions, start: datetime | None, field: str = "options") -> None:
    """Check `spread_until`. `start` is None as long as the start of the batch is not known.

    Raises:
        InvalidInput: SPREAD_UNTIL_INVALID.
    """
    bounds.check_spread(
        f"{field}.spread_until",
        options.spread_until,
        spacing=options.spacing_ms * _MILLISECOND,
        start=start,
        longest_wait=(options.expire_after_ms or 0) * _MILLISECOND,
    )


def under_options(error: InvalidInput, field: str = "options") -> InvalidInput:
    """Return the error of a template, with the path of the template in the request."""
    return InvalidInput(
        "; ".join(f"{field}.{one.field}: {one.description}" for one in error.violations)
        or f"{field}.{error.message}",
        reason=error.reason,
        violations=[
            FieldViolation(f"{field}.{violation.field}", violation.description)
            for violation in error.violations
        ],
        metadata=error.metadata,
    )
