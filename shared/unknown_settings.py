"""Finds environment variables that look like settings but are not, such as OUTBOX_SHARD."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Final

from outbox_server.shared.secret_files import SECRET_SETTINGS
from outbox_server.shared.settings import Settings

_PREFIX: Final = "OUTBOX_"
# Variables of the project's own tests, and those that Kubernetes sets for a service whose name
# begins with "outbox".
_OTHERS: Final = re.compile(
    r"OUTBOX_TEST_.*|.*_SERVICE_(HOST|PORT(_.*)?)|.*_PORT(_\d+_(TCP|UDP)(_(PROTO|PORT|ADDR))?)?"
)


def unknown_settings(names: Iterable[str]) -> list[str]:
    """Return a warning for each name that is not a setting. The warnings contain no values."""
    known = {f"{_PREFIX}{name.upper()}" for name in Settings.model_fields}
    known |= {f"{_PREFIX}{name.upper()}_FILE" for name in SECRET_SETTINGS}
    # pydantic-settings reads names in any case.
    asked = {name.upper() for name in names if name.upper().startswith(_PREFIX)}
    unknown = sorted(name for name in asked - known if not _OTHERS.fullmatch(name))
    return [_warning(name, known) for name in unknown]


def _warning(name: str, known: Iterable[str]) -> str:
    # Compared without the prefix, which all names have in common.
    words = [each.removeprefix(_PREFIX) for each in known]
    close = difflib.get_close_matches(name.removeprefix(_PREFIX), words, n=1)
    meant = f"; did you mean {_PREFIX}{close[0]}?" if close else ""
    return f"{name[:100]} is set, but is not a setting{meant}"
