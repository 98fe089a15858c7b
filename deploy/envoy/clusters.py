"""The processes that Envoy calls, and TLS."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any, Final

from outbox_server.deploy.envoy.gateway import (
    BUFFER_BYTES,
    MIB,
    TYPES,
    Gateway,
    TlsFiles,
    extension,
    socket_address,
)

# The names of Envoy's own certificates.
_TO_CLIENTS: Final = "certificate-to-clients"
_TO_SERVICES: Final = "certificate-to-services"


def cluster(gateway: Gateway, name: str, address: str) -> dict[str, Any]:
    """Return the configuration of one process, which may have many servers."""
    host = address.rpartition(":")[0].strip("[]")
    found: dict[str, Any] = {
        "name": name,
        # A name may have many addresses. A headless service of Kubernetes has one per pod.
        "type": "STATIC" if _is_fixed(address) else "STRICT_DNS",
        "lb_policy": "LEAST_REQUEST",
        "dns_lookup_family": "V4_PREFERRED",
        "connect_timeout": "2s",
        "per_connection_buffer_limit_bytes": BUFFER_BYTES,
        "circuit_breakers": {
            "thresholds": [
                {"max_connections": 100, "max_requests": 10_000, "max_pending_requests": 1_000}
            ]
        },
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": f"{TYPES}upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": {
                    "http2_protocol_options": {
                        "max_concurrent_streams": 1_000,
                        "initial_stream_window_size": BUFFER_BYTES,
                        "initial_connection_window_size": 4 * MIB,
                        "connection_keepalive": {"interval": "30s", "timeout": "10s"},
                    }
                },
            }
        },
        # NOT_SERVING means that a server drains, or that PostgreSQL is away. If most servers report
        # it, Envoy calls them all the same, and the caller gets their own error.
        "health_checks": [
            {
                "timeout": "2s",
                "interval": "2s",
                "no_traffic_interval": "2s",
                "unhealthy_threshold": 2,
                "healthy_threshold": 1,
                "grpc_health_check": {},
            }
        ],
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": socket_address(address)}}]}],
        },
    }
    if gateway.upstream_tls is not None:
        found["transport_socket"] = _client_tls(gateway, gateway.upstream_tls, host)
    return found


def server_tls(gateway: Gateway, files: TlsFiles) -> dict[str, Any]:
    """Return the configuration of TLS to the clients."""
    common = _common_tls(gateway, _TO_CLIENTS, files) | {"alpn_protocols": ["h2", "http/1.1"]}
    if files.ca is not None:
        common["validation_context"] = {"trusted_ca": {"filename": str(files.ca)}}
    return extension(
        "envoy.transport_sockets.tls",
        "transport_sockets.tls.v3.DownstreamTlsContext",
        common_tls_context=common,
        require_client_certificate=files.ca is not None,
    )


def _client_tls(gateway: Gateway, files: TlsFiles, host: str) -> dict[str, Any]:
    kind = "IP_ADDRESS" if _is_ip(host) else "DNS"
    trust = {"filename": str(files.ca or "/etc/ssl/certs/ca-certificates.crt")}
    validation = {
        "trusted_ca": trust,
        "match_typed_subject_alt_names": [{"san_type": kind, "matcher": {"exact": host}}],
    }
    return extension(
        "envoy.transport_sockets.tls",
        "transport_sockets.tls.v3.UpstreamTlsContext",
        common_tls_context=_common_tls(gateway, _TO_SERVICES, files)
        | {"alpn_protocols": ["h2"], "validation_context": validation},
        **({} if _is_ip(host) else {"sni": host}),
    )


def _common_tls(gateway: Gateway, name: str, files: TlsFiles) -> dict[str, Any]:
    common: dict[str, Any] = {"tls_params": {"tls_minimum_protocol_version": "TLSv1_2"}}
    if files.certificate is not None:
        source = {"path_config_source": {"path": str(gateway.folder / f"{name}.json")}}
        common["tls_certificate_sds_secret_configs"] = [{"name": name, "sds_config": source}]
    return common


def certificate_files(gateway: Gateway) -> dict[str, dict[str, Any]]:
    """Return the files that name the certificates, by the names of these files.

    Envoy reads a certificate again when a file is moved into its folder, as Kubernetes and
    cert-manager replace it. It does so only for certificates that have such a file.
    """
    return {
        f"{name}.json": {"resources": [_secret(name, files.certificate, files.key)]}
        for name, files in ((_TO_CLIENTS, gateway.tls), (_TO_SERVICES, gateway.upstream_tls))
        if files is not None and files.certificate is not None
    }


def _secret(name: str, certificate: Path, key: Path | None) -> dict[str, Any]:
    return {
        "@type": f"{TYPES}transport_sockets.tls.v3.Secret",
        "name": name,
        "tls_certificate": {
            "certificate_chain": {"filename": str(certificate)},
            "private_key": {"filename": str(key)},
            "watched_directory": {"path": str(certificate.parent)},
        },
    }


def _is_fixed(address: str) -> bool:
    return address.startswith("unix:") or _is_ip(address.rpartition(":")[0].strip("[]"))


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
