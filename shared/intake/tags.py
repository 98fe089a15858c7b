"""The caller's own id and labels of a job. Pure."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Final, NamedTuple

from outbox_server.shared.bounds import (
    EXTERNAL_ID,
    LABEL_KEY,
    LABEL_VALUE,
    MAX_LABELS,
    control_in,
)
from outbox_server.shared.quoting import quoted

_KEY: Final = re.compile(r"[a-z][a-z0-9_-]*", re.ASCII)
_KEY_BYTES: Final = 8


class RowTags(NamedTuple):
    """The caller's own id and labels of a job, or None. `labels` is a JSON object of texts."""

    external_id: str | None = None
    labels: str | None = None


class BadTag(ValueError):
    """An id or a label is wrong: EXTERNAL_ID_INVALID or LABELS_INVALID."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


class RawTags(NamedTuple):
    """What a row says about its job, not checked yet."""

    external_id: str
    labels: Mapping[str, str]

    def checked(self) -> RowTags | None:
        """Return the tags; None if there are none.

        Raises:
            BadTag: one of them is wrong.
        """
        if not (self.external_id or self.labels):
            return None
        return RowTags(check_external_id(self.external_id), check_labels(self.labels))


def check_external_id(text: str) -> str | None:
    """Return the id; None if it is empty.

    Raises:
        BadTag: EXTERNAL_ID_INVALID.
    """
    if len(text) > EXTERNAL_ID.most:
        problem = f"must have at most {EXTERNAL_ID.most} characters (got {len(text):,})"
        raise BadTag(f"an external id {problem}", EXTERNAL_ID.reason)
    _check_control("an external id", text, EXTERNAL_ID.reason)
    return text or None


def check_labels(labels: Mapping[str, str]) -> str | None:
    """Return labels as they are stored, in the order of their keys; None if there are none.

    Raises:
        BadTag: LABELS_INVALID.
    """
    if not labels:
        return None
    if len(labels) > MAX_LABELS:
        raise BadTag(
            f"there may be at most {MAX_LABELS} labels (got {len(labels):,})", LABEL_KEY.reason
        )
    for key, value in labels.items():
        check_label_key(key)
        if not LABEL_VALUE.least <= len(value) <= LABEL_VALUE.most:
            raise BadTag(
                f"the label `{key}` must have {LABEL_VALUE.least} to {LABEL_VALUE.most} characters "
                f"(got {len(value):,})",
                LABEL_VALUE.reason,
            )
        _check_control(f"the label `{key}`", value, LABEL_VALUE.reason)
    return json.dumps(dict(sorted(labels.items())), ensure_ascii=False, separators=(",", ":"))


def is_label_key(text: str) -> bool:
    """Return whether labels may have this key."""
    return len(text) <= LABEL_KEY.most and _KEY.fullmatch(text) is not None


def check_label_key(key: str) -> None:
    """Check the key of a label.

    Raises:
        BadTag: LABELS_INVALID.
    """
    if not is_label_key(key):
        raise BadTag(
            f"the key of a label must have 1 to {LABEL_KEY.most} characters: a lower-case letter, "
            f"then lower-case letters, digits, `_` and `-` (got {quoted(key)})",
            LABEL_KEY.reason,
        )


def external_key(user_id: str, external_id: str) -> int:
    """Return the number by which the jobs of a user with this id are found: 64 bits.

    It contains the user, so that the jobs of others are not read.
    """
    digest = hashlib.sha256(f"{user_id}\n{external_id}".encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:_KEY_BYTES], "big", signed=True)


def _check_control(what: str, text: str, reason: str) -> None:
    if control := control_in(text):
        raise BadTag(f"{what} cannot contain a control character ({control})", reason)
