"""The channel to a service: the API key on every call, and the client's side of TLS."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import grpc

from cli.client_files import client_files
from cli.lazy import CommandFailed
from shared.auth import is_loopback
from shared.settings import Settings

# In place of a file: the certificate authorities that this machine trusts.
SYSTEM_ROOTS: Final = "system"


def open_channel(
    target: str, settings: Settings, options: Sequence[tuple[str, Any]] = ()
) -> grpc.Channel:
    """Return a channel to `target` that shows who we are.

    Raises:
        CommandFailed: a file cannot be read, or the key would be sent in clear.
    """
    key = _api_key(settings)
    credentials = _tls(settings)
    if credentials is not None:
        channel = grpc.secure_channel(target, credentials, options)
    elif key and not is_loopback(target) and not settings.plaintext:
        raise CommandFailed(
            f"the API key would be sent to {target} in clear: set OUTBOX_TLS_CA or --tls-ca, or "
            "OUTBOX_PLAINTEXT=true where a proxy or mesh encrypts"
        )
    else:
        channel = grpc.insecure_channel(target, options)
    return grpc.intercept_channel(channel, _SendsKey(key)) if key else channel


def _api_key(settings: Settings) -> str:
    file = client_files.get().api_key
    if file is None:
        return settings.api_key.get_secret_value().strip()
    key = _read("--api-key-file", file).decode("ascii", "replace").strip()
    if not key or not key.isprintable():
        raise CommandFailed(f"--api-key-file: {file} holds no API key")
    return key


def _tls(settings: Settings) -> grpc.ChannelCredentials | None:
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
    return grpc.ssl_channel_credentials(
        root_certificates=None if ca == SYSTEM_ROOTS else _read("OUTBOX_TLS_CA", ca),
        private_key=_read("OUTBOX_TLS_CLIENT_KEY", key) if key else None,
        certificate_chain=_read("OUTBOX_TLS_CLIENT_CERTIFICATE", certificate)
        if certificate
        else None,
    )


def _read(name: str, file: Path | str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise CommandFailed(f"{name}: {file} cannot be read: {error.strerror}") from None


class _CallDetails(grpc.ClientCallDetails):
    """A call's details with the key among its metadata; grpc takes what is not set from before."""

    def __init__(self, details: grpc.ClientCallDetails, key: str) -> None:
        self.metadata = (*(details.metadata or ()), ("authorization", f"Bearer {key}"))


class _SendsKey(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Puts the key into the metadata of every call."""

    def __init__(self, key: str) -> None:
        self._key = key

    def _call(
        self,
        continuation: Callable[[grpc.ClientCallDetails, Any], Any],
        details: grpc.ClientCallDetails,
        request: Any,
    ) -> Any:
        return continuation(_CallDetails(details, self._key), request)

    # The four differ in what their stubs say of `request`, and in nothing else.
    intercept_unary_unary = _call  # type: ignore[assignment]
    intercept_unary_stream = _call  # type: ignore[assignment]
    intercept_stream_unary = _call  # type: ignore[assignment]
    intercept_stream_stream = _call  # type: ignore[assignment]
