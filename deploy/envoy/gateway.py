"""The input of Envoy's configuration, and the limits that it sets."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from outbox_server.shared.rpc.calls import UPLOAD_DEADLINE
from outbox_server.shared.rpc.connections import HANDSHAKE_MS, IDLE_MS

# Files in the gateway's folder.
DESCRIPTORS: Final = "outbox.binpb"
OPENAPI: Final = "openapi.json"
# The URL that a readiness probe calls.
HEALTH: Final = "/healthz"

KIB: Final = 1024
MIB: Final = 1024 * KIB
# The JSON of the largest message: a CSV of 4 MiB in base64, and the templates.
MAX_BODY_BYTES: Final = 8 * MIB
# The JSON of the largest response: 16 MiB of text in which most characters are escaped.
MAX_RESPONSE_BYTES: Final = 64 * MIB
# URL and headers of a request together.
MAX_HEADERS_KIB: Final = 60
MAX_CONNECTIONS: Final = 10_000
MAX_PAGE_BYTES: Final = 8 * MIB
BUFFER_BYTES: Final = 256 * KIB

# As of the services: the longest TLS handshake, and the longest time without a call.
HANDSHAKE_LIMIT: Final = timedelta(milliseconds=HANDSHAKE_MS)
IDLE_LIMIT: Final = timedelta(milliseconds=IDLE_MS)
# The server's own limit of a unary call is 30 s. It ends first, because its error says more.
UNARY_LIMIT: Final = timedelta(seconds=40)
# A server gives up an upload that sends nothing for 60 s. It ends first, too.
UPLOAD_LIMIT: Final = timedelta(seconds=UPLOAD_DEADLINE + 10)
UPLOAD_IDLE: Final = timedelta(seconds=90)
# The longest deadline that a caller may set for a unary call.
LONGEST_DEADLINE: Final = timedelta(hours=1)

TYPES: Final = "type.googleapis.com/envoy.extensions."
BUFFER: Final = "envoy.filters.http.buffer"
TRANSCODER: Final = "envoy.filters.http.grpc_json_transcoder"


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files: a certificate chain, its key, and the CA that signs the peers' certificates."""

    certificate: Path | None = None
    key: Path | None = None
    ca: Path | None = None


@dataclass(frozen=True, slots=True)
class Gateway:
    """An Envoy in front of the services. Addresses are `host:port`."""

    listen: str
    # The folder of the configuration, the descriptor set and the pages.
    folder: Path
    # The address of each process. The services of a process that is missing are not offered.
    processes: dict[str, str]
    # TLS to the clients. With a CA, clients must have a certificate.
    tls: TlsFiles | None = None
    # TLS to the services. Without a CA, the machine's CAs are trusted.
    upstream_tls: TlsFiles | None = None
    # Web pages of these origins may call the API (CORS), such as https://app.example.com.
    origins: tuple[str, ...] = ()
    # The number of proxies in front of Envoy, whose x-forwarded-for is trusted.
    trusted_proxies: int = 0
    # The address of the metrics for Prometheus (/stats/prometheus). Empty: none.
    metrics_listen: str = ""
    # For services without API keys: answer calls to this machine's own names only, and refuse web
    # pages of other origins, which could otherwise call the API through a browser on this machine.
    local_only: bool = False
    # The name in the `server` header of every response.
    name: str = "outbox"


def extension(name: str, kind: str, **fields: Any) -> dict[str, Any]:
    """Return the configuration of one of Envoy's extensions."""
    return {"name": name, "typed_config": {"@type": f"{TYPES}{kind}", **fields}}


def socket_address(text: str) -> dict[str, Any]:
    """Return `host:port` or `unix:path` as Envoy writes it."""
    if text.startswith("unix:"):
        return {"pipe": {"path": text.removeprefix("unix:")}}
    host, _, port = text.rpartition(":")
    return {"socket_address": {"address": host.strip("[]"), "port_value": int(port)}}


def seconds(duration: timedelta) -> str:
    """Return a duration as Envoy writes it."""
    return f"{duration.total_seconds():g}s"
