"""How servers are reached: TLS, the API key, time limits, retries, and gRPC's own options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc

from outbox_client.retries import RetryPolicy

_OPTIONS: Final = (
    ("grpc.max_receive_message_length", 16 * 1024 * 1024),
    # The pauses between two attempts to connect: a service that is started again is found within a
    # second.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # gRPC's option for the minimum time limit of one attempt, with TLS and the start of HTTP/2.
    # A server ends a handshake after the same time. A far or busy server needs a second or more.
    ("grpc.min_reconnect_backoff_ms", 10_000),
)


@dataclass(frozen=True, slots=True)
class Tls:
    """TLS to the servers. Everything unset: the certificate authorities that gRPC brings along.

    `ca` is a PEM file of the authorities to trust; `certificate` (the chain) and `key`, together,
    are shown to servers that ask who calls (mTLS). Read once, when the client is made.
    """

    ca: str | Path | None = None
    certificate: str | Path | None = None
    key: str | Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Read the files.

        Raises:
            OSError: one cannot be read.
            ValueError: a certificate without its key, or a key without its certificate.
        """
        if (self.certificate is None) != (self.key is None):
            raise ValueError("mTLS needs both, the certificate and its key")
        ca, certificate, key = (
            None if path is None else Path(path).read_bytes()
            for path in (self.ca, self.certificate, self.key)
        )
        return grpc.ssl_channel_credentials(ca, key, certificate)


@dataclass(frozen=True, slots=True)
class Connection:
    """What every channel and call of a client has in common."""

    api_key: str | None = field(default=None, repr=False)
    credentials: grpc.ChannelCredentials | None = None
    # Limits in seconds of a unary call and of an upload, for all tries together. Streams have none.
    # None means that of the method in the published service config.
    timeout: float | None = None
    upload_timeout: float = 3600.0
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    options: Sequence[tuple[str, Any]] = ()

    @property
    def channel_options(self) -> list[tuple[str, Any]]:
        """Return the options of gRPC: ours, then the caller's, which win."""
        given = {name for name, _ in self.options}
        return [*(one for one in _OPTIONS if one[0] not in given), *self.options]

    def metadata(self, more: Any = None) -> tuple[tuple[str, str | bytes], ...]:
        """Return the metadata of a call."""
        own = [("authorization", f"Bearer {self.api_key}")] if self.api_key else []
        return (*own, *(more or ()))
