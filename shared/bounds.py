"""The bounds of all input from outside. `shared/rpc/field_limits.py` says which field has which.

A length is checked before any regular expression, Unicode normalisation or parser gets the text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from outbox_server.shared.durations import format_duration
from outbox_server.shared.errors import InvalidInput

MIB: Final = 1024 * 1024

# Size of the `csv` of ScheduleBatch, and of a chunk of UploadBatch.
MAX_CSV_BYTES: Final = 4 * MIB
MAX_CHUNK_BYTES: Final = 4 * MIB
# Number of rejections in a response, and in the error of a refused batch.
MAX_SHOWN_REJECTIONS: Final = 100
# Number of rejections in the response to a call that only checks. It is larger because no other
# method can return them.
MAX_CHECKED_REJECTIONS: Final = 1_000
# Number of rows of a preview, and the size of all mails in a response. Clients accept 4 MiB by
# default, and bytes are a third longer in JSON.
MAX_PREVIEWED_ROWS: Final = 20
MAX_SHOWN_MAIL_BYTES: Final = 3 * MIB - 64 * 1024
MAX_SPACING: Final = timedelta(days=7)
MIN_EXPIRE_AFTER: Final = timedelta(seconds=1)
MAX_EXPIRE_AFTER: Final = timedelta(days=366)
# The longest pause that ends by itself.
MAX_PAUSE: Final = timedelta(days=366)
# UpdateBatch: the most unsent jobs that new templates are tried with, and the most rows that are
# named if they do not fit.
MAX_CHECKED_JOBS: Final = 100_000
MAX_SHOWN_FAILURES: Final = 20
# The maximum number of characters of a template in the audit log.
MAX_AUDITED_TEXT: Final = 1_000
# Number of recipients in a forecast of a batch that does not exist yet.
MAX_RECIPIENTS: Final = 10_000_000
MAX_GAP: Final = timedelta(days=1)
MAX_HOURLY_LIMIT: Final = 1_000_000
MAX_IN_FLIGHT: Final = 1_000
# The bound of the quotas of a user.
MAX_QUOTA: Final = 1_000_000_000
# Number of domains that are assigned to one user.
MAX_SENDER_DOMAINS: Final = 1_000
DEFAULT_MAX_IN_FLIGHT: Final = 5
# Number of jobs that one RetryEmailJobs may name.
MAX_RETRIED_IDS: Final = 1_000
MAX_PORT: Final = 65_535
# How deep parentheses and NOT may be nested in a filter, and the number of its comparisons.
MAX_FILTER_DEPTH: Final = 10
MAX_FILTER_TERMS: Final = 50
# Size of the private CAs of an endpoint, and of OUTBOX_SMTP_CA.
MAX_CA_BYTES: Final = 64 * 1024
MAX_CA_CERTIFICATES: Final = 50

# RFC 5321: 256 characters of a path, without its angle brackets.
MAX_ADDRESS: Final = 254
# Size of a template, and of each text that replaces it in one row.
MAX_TEMPLATE_BYTES: Final = 256 * 1024
# Number of rows in one message of ImportSuppressions.
MAX_IMPORTED_ROWS: Final = 10_000
# Number of rows of ScheduleBatch. Its message has room for half as many that have an address.
MAX_ROWS: Final = 1_000_000
# Number of structured rows times the number of columns that the templates use.
MAX_ROW_VALUES: Final = 10_000_000
# Columns of a CSV or a structured row, and the length of their names. The time to normalise a name
# grows with the square of its length.
MAX_COLUMNS: Final = 1_000
MAX_COLUMN_NAME: Final = 256
MAX_HEADER: Final = 256 * 1024
# Separators in one line of a CSV. Cells beyond the header are ignored, but have to be read.
MAX_CELLS: Final = 1_000_000
# Number of lines before the header.
MAX_SKIP_LINES: Final = 1_000
# More than the largest mail. A longer cell is most likely a quote that is never closed.
MAX_CELL: Final = 16 * MIB
# The latest due time that a change may give a job, so that it can be shown, with its expiry.
LATEST_DUE: Final = datetime(9990, 1, 1, tzinfo=UTC)
# The cell of a `schedule_time` or a `time_zone`.
MAX_TIME: Final = 100
# Number of rejections of a batch that are stored. All are counted.
MAX_STORED_REJECTIONS: Final = 10_000
# A bearer token, and the headers of a trace.
MAX_METADATA_VALUE: Final = 1_024

_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def control_in(text: str) -> str:
    """Return the first control character of a text as messages show it (`U+0007`), or ""."""
    found = _CONTROL.search(text)
    return f"U+{ord(found[0]):04X}" if found else ""


@dataclass(frozen=True, slots=True)
class TextBounds:
    """The permitted length of a text, in characters, and the reason of the error if it is wrong."""

    most: int
    reason: str
    least: int = 0

    def check(self, field: str, text: str) -> str:
        """Return `text`. `field` is its path in the request.

        Raises:
            InvalidInput: it is too short or too long, or contains a control character.
        """
        if not self.least <= len(text) <= self.most:
            wanted = f"{self.least} to {self.most:,}" if self.least else f"at most {self.most:,}"
            raise InvalidInput.field(
                field, f"must have {wanted} characters (got {len(text):,})", reason=self.reason
            )
        if control := control_in(text):
            raise InvalidInput.field(
                field, f"contains a control character ({control})", reason=self.reason
            )
        return text


def check_spacing(field: str, spacing: timedelta) -> None:
    """Check the time between two mails of a batch.

    Raises:
        InvalidInput: SPACING_INVALID.
    """
    if not timedelta(0) <= spacing <= MAX_SPACING:
        raise InvalidInput.field(
            field,
            f"must be 0 s to {MAX_SPACING.days} days (got {format_duration(spacing)})",
            reason="SPACING_INVALID",
        )


def check_expire_after(field: str, expire_after: timedelta) -> None:
    """Check how long after its due time a mail may be sent.

    Raises:
        InvalidInput: EXPIRE_AFTER_INVALID.
    """
    if not MIN_EXPIRE_AFTER <= expire_after <= MAX_EXPIRE_AFTER:
        raise InvalidInput.field(
            field,
            f"must be 1 s to {MAX_EXPIRE_AFTER.days} days (got {format_duration(expire_after)})",
            reason="EXPIRE_AFTER_INVALID",
        )


def check_spread(
    field: str,
    spread_until: datetime | None,
    *,
    spacing: timedelta,
    start: datetime | None,
    longest_wait: timedelta | None = None,
) -> None:
    """Check a batch's `spread_until`. If `start` is None, it is not known yet.

    Raises:
        InvalidInput: SPREAD_UNTIL_INVALID.
    """
    if spread_until is None:
        return
    # The path of the other options.
    beside = field.removesuffix("spread_until")
    wrong = ""
    if spacing:
        wrong = f"cannot be combined with {beside}spacing; set one of them"
    elif start is not None and spread_until <= start:
        begins = start.isoformat(timespec="seconds")
        wrong = f"must be later than {beside}schedule_time ({begins})"
    else:
        try:
            spread_until + (longest_wait or timedelta(0))
        except OverflowError:
            wrong = "the last mails would expire after the year 9999"
    if wrong:
        raise InvalidInput.field(field, wrong, reason="SPREAD_UNTIL_INVALID")


# The ids that servers assign have at most 19 characters.
ID: Final = TextBounds(64, "FIELD_TOO_LONG")
ADDRESS: Final = TextBounds(MAX_ADDRESS, "ADDRESS_INVALID")
TIME_OF_DAY: Final = TextBounds(20, "SENDING_HOURS_INVALID")
CONTENT_TYPE: Final = TextBounds(255, "FILE_TYPE_INVALID")
MASK_PATH: Final = TextBounds(200, "UPDATE_MASK_INVALID")
# The longest line of a mail, without its end (RFC 5322, 2.1.1). Servers cut a longer subject, even
# if it is folded into several lines.
MAX_SUBJECT_BYTES: Final = 998
# The headers that a caller adds to a mail: their number, the template of one, and its line.
MAX_HEADERS: Final = 20
MAX_HEADER_TEMPLATE_BYTES: Final = 4 * 1024
MAX_HEADER_BYTES: Final = 998
HEADER_NAME: Final = TextBounds(64, "HEADER_INVALID", least=1)
# The caller's own ids and labels of batches and jobs.
EXTERNAL_ID: Final = TextBounds(128, "EXTERNAL_ID_INVALID")
MAX_LABELS: Final = 16
LABEL_KEY: Final = TextBounds(63, "LABELS_INVALID", least=1)
LABEL_VALUE: Final = TextBounds(128, "LABELS_INVALID", least=1)
# 253 characters (RFC 1035), and the `*.` of a wildcard.
SENDER_DOMAIN: Final = TextBounds(255, "SENDER_DOMAIN_INVALID")
# A value of an output-only field, which a caller sends back and the server ignores.
OUTPUT: Final = TextBounds(2_000, "FIELD_TOO_LONG")
# An address of 254 characters as JSON escapes and as base64 has 4,082 characters.
PAGE_TOKEN: Final = TextBounds(4_096, "PAGE_TOKEN_INVALID")
RESUME_TOKEN: Final = TextBounds(4_096, "RESUME_TOKEN_INVALID")
USER_ID: Final = TextBounds(128, "USER_ID_INVALID", least=1)
REQUEST_ID: Final = TextBounds(128, "REQUEST_ID_INVALID", least=1)
IDENTITY: Final = TextBounds(200, "IDENTITY_INVALID")
CHANGE_REASON: Final = TextBounds(500, "CHANGE_REASON_INVALID")
ETAG: Final = TextBounds(64, "FIELD_TOO_LONG")
# `suppressions/` and an address.
AUDIT_TARGET: Final = TextBounds(300, "FIELD_TOO_LONG")
DISPLAY_NAME: Final = TextBounds(200, "DISPLAY_NAME_INVALID")
SUPPRESSION_REASON: Final = TextBounds(500, "SUPPRESSION_REASON_INVALID")
SMTP_HOST: Final = TextBounds(253, "SMTP_ENDPOINT_INVALID", least=1)
SMTP_USERNAME: Final = TextBounds(320, "SMTP_ENDPOINT_INVALID")
SMTP_PASSWORD: Final = TextBounds(1_024, "SMTP_ENDPOINT_INVALID")
OAUTH2_TENANT: Final = TextBounds(255, "SMTP_ENDPOINT_INVALID")
OAUTH2_TOKEN_URL: Final = TextBounds(2_048, "SMTP_ENDPOINT_INVALID", least=1)
OAUTH2_CLIENT_ID: Final = TextBounds(512, "SMTP_ENDPOINT_INVALID", least=1)
OAUTH2_CLIENT_SECRET: Final = TextBounds(1_024, "SMTP_ENDPOINT_INVALID")
OAUTH2_REFRESH_TOKEN: Final = TextBounds(8_192, "SMTP_ENDPOINT_INVALID")
OAUTH2_SCOPE: Final = TextBounds(1_024, "SMTP_ENDPOINT_INVALID")
EMAIL_COLUMN: Final = TextBounds(MAX_COLUMN_NAME, "EMAIL_COLUMN_INVALID")
NAME_COLUMN: Final = TextBounds(MAX_COLUMN_NAME, "NAME_COLUMN_INVALID")
EXTERNAL_ID_COLUMN: Final = TextBounds(MAX_COLUMN_NAME, "EXTERNAL_ID_COLUMN_INVALID")
LABEL_COLUMN: Final = TextBounds(MAX_COLUMN_NAME, "LABEL_COLUMNS_INVALID", least=1)
TIME_ZONE: Final = TextBounds(64, "UNKNOWN_TIME_ZONE")
FILTER: Final = TextBounds(4_000, "FILTER_INVALID")
ORDER_BY: Final = TextBounds(100, "ORDER_BY_INVALID")
# How long the old secret of a webhook may sign after a rotation.
MAX_OLD_SECRET_DURATION: Final = timedelta(days=7)
WEBHOOK_URL: Final = TextBounds(2_048, "WEBHOOK_URL_INVALID", least=1)
