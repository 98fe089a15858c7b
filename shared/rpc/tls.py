"""TLS for the servers: reads the files of OUTBOX_TLS_*, again whenever they change."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import grpc
import structlog

from outbox_server.shared.errors import ConfigurationError
from outbox_server.shared.settings import Settings

# For each file: inode, size and modification time.
_Stamp: TypeAlias = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class CertificateFiles:
    """The files of a server's certificate chain, its key and its clients' CA ("": any client)."""

    certificate: str
    key: str
    client_ca: str = ""

    def read(self) -> grpc.ServerCertificateConfiguration:
        """Return the checked content of the files.

        Raises:
            OSError: a file is missing or not PEM, or the key does not match the certificate.
        """
        # grpc would report a wrong pair, or one that is not PEM, only at a handshake.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, self.key)
        roots = None
        if self.client_ca:
            context.load_verify_locations(self.client_ca)
            roots = Path(self.client_ca).read_bytes()
        pair = (Path(self.key).read_bytes(), Path(self.certificate).read_bytes())
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=roots)

    def stamp(self) -> _Stamp:
        """Return a value that changes when the files change; costs a system call per file."""
        names = (self.certificate, self.key, self.client_ca)
        found = [Path(name).stat() for name in names if name]
        return tuple((one.st_ino, one.st_size, one.st_mtime_ns) for one in found)


class _Reloader:
    """Reads changed files. grpc calls it at each handshake, on a thread of its own."""

    def __init__(self, files: CertificateFiles, stamp: _Stamp) -> None:
        self._files = files
        self._stamp = stamp
        self._log = structlog.get_logger("outbox.tls")

    def __call__(self) -> grpc.ServerCertificateConfiguration | None:
        """Return the new content of the files; None if they did not change.

        Wrong files, as between two writes, change nothing, and are read again at the next call.
        """
        try:
            stamp = self._files.stamp()
            if stamp == self._stamp:
                return None
            # The stamp is taken before the read, so that a change after it is noticed at the next
            # call.
            read = self._files.read()
        except OSError as error:  # ssl.SSLError is one
            self._log.warning(
                "certificate not reloaded; the previous one stays in use",
                certificate=self._files.certificate,
                error=str(error),
            )
            return None
        self._stamp = stamp
        self._log.info("certificate reloaded", certificate=self._files.certificate)
        return read


def server_credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """Return the credentials of OUTBOX_TLS_*; None means no TLS.

    Raises:
        ConfigurationError: a file is missing or wrong.
    """
    certificate, key, client_ca = (
        settings.tls_certificate,
        settings.tls_key,
        settings.tls_client_ca,
    )
    if not certificate and not key:
        if client_ca:
            raise ConfigurationError(
                "OUTBOX_TLS_CLIENT_CA: client certificates require TLS; set "
                "OUTBOX_TLS_CERTIFICATE and OUTBOX_TLS_KEY too"
            )
        return None
    if not certificate or not key:
        raise ConfigurationError("OUTBOX_TLS_CERTIFICATE and OUTBOX_TLS_KEY: set both, or neither")
    files = CertificateFiles(certificate, key, client_ca)
    try:
        stamp = files.stamp()
        read = files.read()
    except OSError as error:
        asked = f", OUTBOX_TLS_CLIENT_CA={client_ca}" if client_ca else ""
        raise ConfigurationError(
            f"OUTBOX_TLS_CERTIFICATE={certificate}, OUTBOX_TLS_KEY={key}{asked}: "
            f"not a PEM certificate chain and its private key: {error}"
        ) from error
    return grpc.dynamic_ssl_server_credentials(
        read,
        _Reloader(files, stamp),  # type: ignore[arg-type]  # the stubs do not allow None
        require_client_authentication=bool(client_ca),
    )
