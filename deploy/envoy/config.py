"""Builds the configuration of Envoy, a dictionary that is written as JSON.

Calls over REST are transcoded to gRPC; gRPC-Web and gRPC pass through. All use one port. The list
of services and methods comes from the descriptor set, which Envoy reads as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from outbox_server.deploy.contract import GatewayService
from outbox_server.deploy.envoy.clusters import cluster, server_tls
from outbox_server.deploy.envoy.gateway import (
    BUFFER,
    BUFFER_BYTES,
    HANDSHAKE_LIMIT,
    HEALTH,
    IDLE_LIMIT,
    MAX_BODY_BYTES,
    MAX_CONNECTIONS,
    MAX_HEADERS_KIB,
    MAX_PAGE_BYTES,
    MIB,
    TRANSCODER,
    TYPES,
    Gateway,
    extension,
    seconds,
    socket_address,
)
from outbox_server.deploy.envoy.replies import local_replies
from outbox_server.deploy.envoy.routes import transcoder, virtual_hosts


def build_config(gateway: Gateway, services: Sequence[GatewayService]) -> dict[str, Any]:
    """Return the configuration."""
    served = [service for service in services if service.process in gateway.processes]
    config: dict[str, Any] = {
        # Required for certificates that are read again.
        "node": {"id": "gateway", "cluster": "outbox"},
        "static_resources": {
            "listeners": [_listener(gateway, served)],
            "clusters": [
                cluster(gateway, name, address) for name, address in gateway.processes.items()
            ],
        },
        "overload_manager": {
            "resource_monitors": [
                {
                    "name": "envoy.resource_monitors.global_downstream_max_connections",
                    "typed_config": {
                        "@type": f"{TYPES}resource_monitors.downstream_connections.v3"
                        ".DownstreamConnectionsConfig",
                        "max_active_downstream_connections": MAX_CONNECTIONS,
                    },
                }
            ]
        },
    }
    if gateway.metrics_listen:
        _add_metrics(config, gateway)
    return config


def _listener(gateway: Gateway, services: Sequence[GatewayService]) -> dict[str, Any]:
    chain: dict[str, Any] = {"filters": [_http_manager(gateway, services)]}
    if gateway.tls is not None:
        chain["transport_socket"] = server_tls(gateway, gateway.tls)
        # Without this limit, a handshake may last for ever.
        chain["transport_socket_connect_timeout"] = seconds(HANDSHAKE_LIMIT)
    return {
        "name": "gateway",
        "address": socket_address(gateway.listen),
        # Not a second Envoy on the same port: it would share the calls, instead of failing.
        "enable_reuse_port": not gateway.local_only,
        "per_connection_buffer_limit_bytes": BUFFER_BYTES,
        # Detects clients that vanished: a watch may send nothing for hours.
        "socket_options": [
            {"description": name, "level": level, "name": option, "int_value": value}
            for name, level, option, value in (
                ("SO_KEEPALIVE", 1, 9, 1),
                ("TCP_KEEPIDLE", 6, 4, 60),
                ("TCP_KEEPINTVL", 6, 5, 20),
                ("TCP_KEEPCNT", 6, 6, 3),
            )
        ],
        "filter_chains": [chain],
    }


def _http_manager(gateway: Gateway, services: Sequence[GatewayService]) -> dict[str, Any]:
    return extension(
        "envoy.filters.network.http_connection_manager",
        "filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="gateway",
        server_name=gateway.name,
        use_remote_address=True,
        xff_num_trusted_hops=gateway.trusted_proxies,
        preserve_external_request_id=True,
        always_set_request_id_in_response=True,
        normalize_path=True,
        merge_slashes=True,
        max_request_headers_kb=MAX_HEADERS_KIB,
        request_headers_timeout=seconds(timedelta(seconds=10)),
        # Each route has its own limit.
        stream_idle_timeout="0s",
        common_http_protocol_options={
            "idle_timeout": seconds(IDLE_LIMIT),
            "max_headers_count": 100,
            "headers_with_underscores_action": "REJECT_REQUEST",
        },
        http2_protocol_options={
            "max_concurrent_streams": 100,
            "initial_stream_window_size": BUFFER_BYTES,
            "initial_connection_window_size": MIB,
            "connection_keepalive": {"interval": "60s", "timeout": "20s"},
        },
        local_reply_config=local_replies(),
        access_log=_access_logs(),
        route_config={
            # The limit of a page, which is an answer of Envoy itself.
            "max_direct_response_body_size_bytes": MAX_PAGE_BYTES,
            "virtual_hosts": virtual_hosts(gateway, services),
        },
        http_filters=[
            extension(
                "envoy.filters.http.health_check",
                "filters.http.health_check.v3.HealthCheck",
                pass_through_mode=False,
                headers=[{"name": ":path", "string_match": {"exact": HEALTH}}],
            ),
            extension("envoy.filters.http.cors", "filters.http.cors.v3.Cors"),
            extension("envoy.filters.http.grpc_web", "filters.http.grpc_web.v3.GrpcWeb"),
            # The transcoder passes on a body in pieces, so it does not limit the whole.
            extension(BUFFER, "filters.http.buffer.v3.Buffer", max_request_bytes=MAX_BODY_BYTES),
            {"name": TRANSCODER, "typed_config": transcoder(gateway, services)},
            extension("envoy.filters.http.router", "filters.http.router.v3.Router"),
        ],
    )


def _access_logs() -> list[dict[str, Any]]:
    """Return the access log: no bodies, and no addresses, which a URL may contain.

    A URL is logged only as the gRPC method that it was transcoded to.
    """
    fields = {
        "time": "%START_TIME%",
        "code": "%RESPONSE_CODE%",
        "grpc_status": "%GRPC_STATUS%",
        "milliseconds": "%DURATION%",
        "received_bytes": "%BYTES_RECEIVED%",
        "sent_bytes": "%BYTES_SENT%",
        "peer": "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%",
        "server": "%UPSTREAM_HOST%",
        "details": "%RESPONSE_CODE_DETAILS%",
        "request_id": "%REQ(X-REQUEST-ID)%",
        "protocol": "%PROTOCOL%",
    }
    called = {
        "name": "content-type",
        "string_match": {"prefix": "application/grpc"},
        "treat_missing_header_as_empty": True,
    }
    return [
        extension(
            "envoy.access_loggers.stdout",
            "access_loggers.stream.v3.StdoutAccessLog",
            log_format={"json_format": fields | {"method": method}},
        )
        | {"filter": _both(called | {"invert_match": inverted})}
        for method, inverted in (("%REQ(:PATH)%", False), ("%REQ(:METHOD)%", True))
    ]


def _both(header: dict[str, Any]) -> dict[str, Any]:
    """Return the filter of requests with a header that are not health checks."""
    both = [{"header_filter": {"header": header}}, {"not_health_check_filter": {}}]
    return {"and_filter": {"filters": both}}


def _add_metrics(config: dict[str, Any], gateway: Gateway) -> None:
    """Serve Envoy's metrics, and nothing else of its admin interface, which has no address."""
    socket = {"pipe": {"path": str(gateway.folder / "admin.sock"), "mode": 0o600}}
    config["admin"] = {"address": socket}
    config["static_resources"]["clusters"].append(
        {
            "name": "admin",
            "type": "STATIC",
            "connect_timeout": "1s",
            "load_assignment": {
                "cluster_name": "admin",
                "endpoints": [{"lb_endpoints": [{"endpoint": {"address": socket}}]}],
            },
        }
    )
    path = "/stats/prometheus"
    manager = extension(
        "envoy.filters.network.http_connection_manager",
        "filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="metrics",
        route_config={
            "virtual_hosts": [
                {
                    "name": "metrics",
                    "domains": ["*"],
                    "routes": [
                        {
                            "match": {
                                "path": path,
                                "headers": [{"name": ":method", "string_match": {"exact": "GET"}}],
                            },
                            "route": {"cluster": "admin", "timeout": "10s"},
                        }
                    ],
                }
            ]
        },
        http_filters=[extension("envoy.filters.http.router", "filters.http.router.v3.Router")],
    )
    config["static_resources"]["listeners"].append(
        {
            "name": "metrics",
            "address": socket_address(gateway.metrics_listen),
            "filter_chains": [{"filters": [manager]}],
        }
    )
