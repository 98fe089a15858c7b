"""Who calls, and whom the client trusts: what the options and variables say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from outbox_client import Tls

from outbox_server.cli.client_files import client_files
from outbox_server.cli.lazy import CommandFailed
from outbox_server.shared.callers import is_loopback
from outbox_server.shared.settings import Settings

# In place of a file: the certificate authorities that this machine trusts.
SYSTEM_ROOTS: Final = "system"


@dataclass(frozen=True, slots=True)
class Credentials:
    """The API key, empty if there is none, and TLS, None for plain text."""

    api_key: str
    tls: Tls | None


def credentials_for(target: str, settings: Settings) -> Credentials:
    """Return what to show to `target`.

    Raises:
        CommandFailed: a file cannot be read, or the key would be sent in clear.
    """
    key = _api_key(settings)
    tls = _tls(settings)
    if tls is None and key and not is_loopback(target) and not settings.plaintext:
        raise CommandFailed(
            f"the API key would be sent to {target} in clear: set OUTBOX_TLS_CA or --tls-ca, or "
            "OUTBOX_PLAINTEXT=true where a proxy or mesh encrypts"
        )
    return Credentials(key, tls)


def _api_key(settings: Settings) -> str:
    file = client_files.get().api_key
    if file is None:
        return settings.api_key.get_secret_value().strip()
    try:
        key = file.read_bytes().decode("ascii", "replace").strip()
    except OSError as error:
        raise CommandFailed(f"--api-key-file: {file} cannot be read: {error.strerror}") from None
    if not key or not key.isprintable():
        raise CommandFailed(f"--api-key-file: {file} holds no API key")
    return key


def _tls(settings: Settings) -> Tls | None:
    files = client_files.get()
    ca = settings.tls_ca if files.tls_ca is None else files.tls_ca
    certificate = files.tls_certificate or settings.tls_client_certificate
    key = files.tls_key or settings.tls_client_key
    if bool(certificate) != bool(key):
        raise CommandFailed(
            "a certificate needs its key: set OUTBOX_TLS_CLIENT_CERTIFICATE and "
            "OUTBOX_TLS_CLIENT_KEY, or --tls-cert and --tls-key, or neither"
        )
    if not ca and certificate:
        raise CommandFailed(
            "a client's certificate needs TLS: say whom to trust with OUTBOX_TLS_CA or --tls-ca, "
            f"a PEM file or `{SYSTEM_ROOTS}`"
        )
    if not ca:
        return None
    return Tls(
        ca=None if ca == SYSTEM_ROOTS else _readable("OUTBOX_TLS_CA", ca),
        certificate=_readable("OUTBOX_TLS_CLIENT_CERTIFICATE", certificate) if key else None,
        key=_readable("OUTBOX_TLS_CLIENT_KEY", key) if key else None,
    )


def _readable(name: str, file: Path | str) -> Path:
    """Return the file's path: the client reads it, and here we know what it was called."""
    path = Path(file)
    try:
        path.open("rb").close()
    except OSError as error:
        raise CommandFailed(f"{name}: {path} cannot be read: {error.strerror}") from None
    return path
