"""Opens the tracer of a process, if traces are on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from outbox_server.shared.errors import ConfigurationError
from outbox_server.shared.settings import Settings

if TYPE_CHECKING:
    from outbox_server.shared.traces.tracer import Tracer

_SCHEMES: Final = ("http", "https")


def open_tracer(settings: Settings, service: str) -> Tracer | None:
    """Return the tracer of a service; None without OUTBOX_TRACES_ENDPOINT.

    Raises:
        ConfigurationError: the endpoint is not the URL of a gRPC server.
    """
    endpoint = settings.traces_endpoint
    if not endpoint:
        return None
    try:
        url = urlsplit(endpoint)
        valid = url.scheme in _SCHEMES and bool(url.hostname) and bool(url.port)
    except ValueError:
        valid = False
    if not valid:
        raise ConfigurationError(
            f"OUTBOX_TRACES_ENDPOINT: {endpoint!r} is not the URL of an OTLP gRPC endpoint; write "
            "http://host:4317, or https://host:4317 for TLS"
        )
    # Importing the SDK takes as long as importing all of a service, and most processes need none.
    from outbox_server.shared.traces.tracer import Tracer  # noqa: PLC0415

    return Tracer(endpoint, service, server_texts=settings.log_addresses)
