"""The global options of `outbox`: the files with the caller's credentials and the trusted CA."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Final


@dataclass(frozen=True, slots=True)
class ClientFiles:
    """The values of the options. None means that the corresponding variable applies."""

    api_key: Path | None = None
    # A PEM file, or `system`.
    tls_ca: str | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None


_NONE: Final = ClientFiles()
client_files: Final[ContextVar[ClientFiles]] = ContextVar("client_files", default=_NONE)
