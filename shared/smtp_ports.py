"""The ports that users' endpoints may have: the usual mail ports, unless the operator adds more."""

from __future__ import annotations

import re
from typing import Final

from outbox_server.shared.bounds import MAX_PORT
from outbox_server.shared.errors import ConfigurationError

# Means that every port is permitted.
ANY: Final = "any"
_PORT: Final = re.compile(r"[0-9]{1,5}")


class PermittedPorts:
    """The ports of OUTBOX_SMTP_PORTS."""

    def __init__(self, text: str = ANY) -> None:
        """Read a list of ports, or `any`.

        Raises:
            ConfigurationError: `text` is neither.
        """
        self._ports: frozenset[int] | None = None
        if text.strip().casefold() == ANY:
            return
        words = [word.strip() for word in text.split(",")]
        if not all(_PORT.fullmatch(word) and 1 <= int(word) <= MAX_PORT for word in words):
            raise ConfigurationError(
                f"OUTBOX_SMTP_PORTS: {text!r} is not a list of ports; write 25,465,587,2525, or any"
            )
        self._ports = frozenset(map(int, words))

    def refusal(self, port: int) -> str:
        """Return why a port is refused; an empty text if it is permitted."""
        if self._ports is None or port in self._ports:
            return ""
        *others, last = map(str, sorted(self._ports))
        permitted = f"{', '.join(others)} or {last}" if others else last
        return f"must be {permitted}; the operator can add ports in OUTBOX_SMTP_PORTS (got {port})"
