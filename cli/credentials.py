"""The caller's credentials and the trusted CA, from the options and variables."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from outbox_client import Tls

from outbox_server.cli.client_options import connection_options
from outbox_server.cli.lazy import CommandFailed
from outbox_server.shared.callers import is_loopback
from outbox_server.shared.settings import Settings

# Given instead of a file, this means the CAs that this machine trusts.
SYSTEM_ROOTS: Final = "system"


@dataclass(frozen=True, slots=True)
class Credentials:
    """The API key (empty if there is none), and TLS (None for plain text)."""

    api_key: str
    tls: Tls | None


def credentials_for(target: str, settings: Settings, key_file: Path | None = None) -> Credentials:
    """Return the credentials for a call to `target`. `key_file` has a key if the caller has none.

    Raises:
        CommandFailed: a file cannot be read, or the key would be sent unencrypted.
    """
    key = api_key_of(settings)
    if not key and key_file is not None:
        key = _key_in(key_file, "the key of `outbox up`")
    tls = _tls(settings)
    if tls is None and key and not is_loopback(target) and not settings.plaintext:
        raise CommandFailed(
            f"the API key would be sent to {target} in clear text: set OUTBOX_TLS_CA or --tls-ca, "
            "or OUTBOX_PLAINTEXT=true if a proxy or mesh encrypts the connection"
        )
    return Credentials(key, tls)


def api_key_of(settings: Settings) -> str:
    """Return the key of --api-key-file, OUTBOX_API_KEY or OUTBOX_API_KEY_FILE; empty if none is.

    Raises:
        CommandFailed: the file cannot be read, or contains no key.
    """
    file = connection_options.get().api_key_file
    if file is None:
        return settings.api_key.get_secret_value().strip()
    return _key_in(Path(file), "--api-key-file")


def _key_in(file: Path, origin: str) -> str:
    try:
        key = file.read_bytes().decode("ascii", "replace").strip()
    except OSError as error:
        raise CommandFailed(f"{origin}: {file} cannot be read: {error.strerror}") from None
    if not key or not key.isprintable():
        raise CommandFailed(f"{origin}: {file} contains no API key")
    return key


def _tls(settings: Settings) -> Tls | None:
    given = connection_options.get()
    ca = settings.tls_ca if given.tls_ca is None else given.tls_ca
    certificate = given.tls_cert or settings.tls_client_certificate
    key = given.tls_key or settings.tls_client_key
    if bool(certificate) != bool(key):
        raise CommandFailed(
            "a client certificate requires its private key: set OUTBOX_TLS_CLIENT_CERTIFICATE and "
            "OUTBOX_TLS_CLIENT_KEY, or --tls-cert and --tls-key, or neither"
        )
    if not ca and certificate:
        raise CommandFailed(
            "a client certificate requires TLS: set OUTBOX_TLS_CA or --tls-ca to a PEM file with "
            f"the trusted CA, or to `{SYSTEM_ROOTS}`"
        )
    if not ca:
        return None
    ca_name = "OUTBOX_TLS_CA" if given.tls_ca is None else "--tls-ca"
    certificate_name = "--tls-cert" if given.tls_cert else "OUTBOX_TLS_CLIENT_CERTIFICATE"
    key_name = "--tls-key" if given.tls_key else "OUTBOX_TLS_CLIENT_KEY"
    return Tls(
        ca=None if ca == SYSTEM_ROOTS else _readable(ca_name, ca),
        certificate=_readable(certificate_name, certificate) if key else None,
        key=_readable(key_name, key) if key else None,
    )


def _readable(name: str, file: Path | str) -> Path:
    """Return the path of a readable file. `name` is the option or variable, for the error."""
    path = Path(file)
    try:
        path.open("rb").close()
    except OSError as error:
        raise CommandFailed(f"{name}: {path} cannot be read: {error.strerror}") from None
    return path
