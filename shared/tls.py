"""Decides which server certificates to trust: those signed by the machine's or by private CAs."""

from __future__ import annotations

import asyncio
import re
import ssl
from pathlib import Path
from typing import Final

from cachetools import LRUCache
from cryptography import x509

from outbox_server.shared.bounds import MAX_CA_BYTES, MAX_CA_CERTIFICATES
from outbox_server.shared.errors import ConfigurationError
from outbox_server.shared.settings import Settings

# The number of contexts that are kept. One with the machine's CAs takes almost a megabyte.
_MAX_CONTEXTS: Final = 64
_BEGIN: Final = "-----BEGIN CERTIFICATE-----"
_NOT_PEM: Final = re.compile(r"[^\t\r\n\x20-\x7e]")


class TlsContexts:
    """TLS contexts for sessions, one per set of private CAs. Those used last are kept.

    `ca` holds the operator's CA certificates (PEM), which are trusted for every endpoint.
    """

    def __init__(self, ca: str = "") -> None:
        self._ca = ca
        self._contexts: LRUCache[str, ssl.SSLContext] = LRUCache(_MAX_CONTEXTS)

    @classmethod
    def from_settings(cls, settings: Settings) -> TlsContexts:
        """Read OUTBOX_SMTP_CA.

        Raises:
            ConfigurationError: the file cannot be read, or contains no certificate.
        """
        return cls(operator_ca(settings))

    async def context_for(self, ca: str) -> ssl.SSLContext:
        """Return a context that also trusts the certificates in `ca` (PEM; empty means none).

        Raises:
            ssl.SSLError: `ca` contains no certificate.
        """
        context = self._contexts.get(ca)
        if context is None:
            # Reading the machine's CAs takes tens of milliseconds.
            context = await asyncio.to_thread(trusting_context, self._ca, ca)
            self._contexts[ca] = context
        return context


def trusting_context(*private_cas: str) -> ssl.SSLContext:
    """Return a context that trusts the machine's CAs and these certificates (PEM; may be empty).

    Raises:
        ssl.SSLError: one of the texts contains no certificate.
    """
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH)
    for text in filter(None, private_cas):
        # A private CA may be an intermediate one whose own issuer is not in the file.
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        context.load_verify_locations(cadata=text)
    return context


def check_ca(text: str) -> None:
    """Check that a text consists of CA certificates in PEM.

    Raises:
        ValueError: it contains none, too many, one that cannot be read, or anything else.
    """
    if len(text) > MAX_CA_BYTES:
        raise ValueError(f"must be at most {MAX_CA_BYTES} bytes (got {len(text)})")
    strange = _NOT_PEM.search(text)
    if strange:
        raise ValueError(f"must be PEM, in ASCII (got a character U+{ord(strange[0]):04X})")
    if "PRIVATE KEY-----" in text:
        # The stored text is not encrypted, and GetSender returns it.
        raise ValueError("must contain certificates only (got a private key)")
    if (count := text.count(_BEGIN)) > MAX_CA_CERTIFICATES:
        raise ValueError(f"must contain at most {MAX_CA_CERTIFICATES} certificates (got {count})")
    try:
        certificates = x509.load_pem_x509_certificates(text.encode("ascii"))
        # OpenSSL reads the text later, and may refuse what `cryptography` accepts.
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=text)
    except (ValueError, ssl.SSLError):
        certificates = []
    if not certificates:
        raise ValueError("must contain a certificate in PEM (-----BEGIN CERTIFICATE-----)")


def operator_ca(settings: Settings) -> str:
    """Return the content of the file OUTBOX_SMTP_CA (PEM); empty if the setting is unset.

    Raises:
        ConfigurationError: the file cannot be read, or contains no certificate.
    """
    path = settings.smtp_ca
    if not path:
        return ""
    try:
        with Path(path).open("rb") as file:
            text = file.read(MAX_CA_BYTES + 1).decode("ascii")
        check_ca(text)
    except OSError as error:
        raise ConfigurationError(
            f"OUTBOX_SMTP_CA: {path} cannot be read: {error.strerror}"
        ) from None
    except ValueError as error:
        reason = "is not PEM" if isinstance(error, UnicodeDecodeError) else str(error)
        raise ConfigurationError(f"OUTBOX_SMTP_CA: {path} {reason}") from None
    return text
