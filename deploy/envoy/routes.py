"""The routes of Envoy: which process serves a call, and how long the call may take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from outbox_server.deploy.contract import CallKind, GatewayService
from outbox_server.deploy.envoy.gateway import (
    BUFFER,
    DESCRIPTORS,
    LONGEST_DEADLINE,
    MAX_BODY_BYTES,
    MAX_RESPONSE_BYTES,
    OPENAPI,
    TRANSCODER,
    TYPES,
    UNARY_LIMIT,
    UPLOAD_IDLE,
    UPLOAD_LIMIT,
    Gateway,
    seconds,
)

# The pages: URL, file, content type.
PAGES: Final = (
    ("/openapi.json", OPENAPI, "application/json"),
    ("/docs", "index.html", "text/html; charset=utf-8"),
    ("/docs/start.js", "start.js", "text/javascript; charset=utf-8"),
    ("/docs/swagger-ui-bundle.js", "swagger-ui-bundle.js", "text/javascript; charset=utf-8"),
    ("/docs/swagger-ui.css", "swagger-ui.css", "text/css; charset=utf-8"),
)
_PAGE_POLICY: Final = (
    "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "frame-ancestors 'none'"
)


def transcoder(
    gateway: Gateway, services: Sequence[GatewayService], *, events: bool = False
) -> dict[str, Any]:
    """Return the transcoder's configuration. A stream is NDJSON, or `events` (SSE)."""
    style = "stream_sse_style_delimited" if events else "stream_newline_delimited"
    return {
        "@type": f"{TYPES}filters.http.grpc_json_transcoder.v3.GrpcJsonTranscoder",
        "proto_descriptor": str(gateway.folder / DESCRIPTORS),
        "services": [service.name for service in services],
        # The details of an error become its JSON. This needs google/rpc/error_details.proto in the
        # descriptor set: without it, the body of every error is empty.
        "convert_grpc_status": True,
        "case_insensitive_enum_parsing": True,
        # Browsers, curl and most libraries write a space in a query as a plus sign.
        "query_param_unescape_plus": True,
        "max_request_body_size": MAX_BODY_BYTES,
        "max_response_body_size": MAX_RESPONSE_BYTES,
        "request_validation_options": {
            "reject_unknown_method": True,
            "reject_unknown_query_parameters": True,
            "reject_binding_body_field_collisions": True,
        },
        "print_options": {
            "preserve_proto_field_names": True,
            "always_print_primitive_fields": True,
            style: True,
        },
    }


def virtual_hosts(gateway: Gateway, services: Sequence[GatewayService]) -> list[dict[str, Any]]:
    """Return the hosts that Envoy answers for, with all routes."""
    api: dict[str, Any] = {
        "name": "api",
        "domains": ["*"],
        "routes": [*_page_routes(gateway), *_api_routes(gateway, services)],
    }
    if gateway.origins:
        api["typed_per_filter_config"] = {"envoy.filters.http.cors": _cors(gateway.origins)}
    if not gateway.local_only:
        return [api]
    port = gateway.listen.rpartition(":")[2]
    names = [f"{name}:{port}" for name in ("127.0.0.1", "localhost", "[::1]")]
    api["domains"] = names
    scheme = "http" if gateway.tls is None else "https"
    own = [f"{scheme}://{name}" for name in names]
    api["routes"].insert(0, _refuse_origins([*own, *gateway.origins]))
    refusal = _refusal(f"this gateway answers only as {', '.join(names)}")
    return [
        api,
        {"name": "others", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, **refusal}]},
    ]


def _refuse_origins(allowed: Sequence[str]) -> dict[str, Any]:
    return {
        "match": {
            "prefix": "/",
            "headers": [
                {"name": "origin", "present_match": True},
                *(
                    {"name": "origin", "string_match": {"exact": origin}, "invert_match": True}
                    for origin in allowed
                ),
            ],
        },
        **_refusal("web pages of this origin may not call this API"),
    }


def _refusal(text: str) -> dict[str, Any]:
    return {
        "direct_response": {"status": 403, "body": {"inline_string": text}},
        **_no_transcoder(),
    }


def _page_routes(gateway: Gateway) -> Iterator[dict[str, Any]]:
    yield {
        "match": {"path": "/"},
        "redirect": {"path_redirect": "/docs", "response_code": "FOUND"},
        **_no_transcoder(),
    }
    for url, name, kind in PAGES:
        yield {
            "match": {"path": url},
            "direct_response": {
                "status": 200,
                "body": {"filename": str(gateway.folder / name)},
            },
            "response_headers_to_add": [
                {
                    "header": {"key": key, "value": value},
                    "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
                }
                for key, value in (
                    ("content-type", kind),
                    ("content-security-policy", _PAGE_POLICY),
                    ("x-content-type-options", "nosniff"),
                )
            ],
            **_no_transcoder(),
        }


def _api_routes(gateway: Gateway, services: Sequence[GatewayService]) -> Iterator[dict[str, Any]]:
    """Yield the routes of calls.

    A REST call is routed twice: by its URL, then by the gRPC method that it was transcoded to. The
    first route only limits the size of its body and the time that it takes to arrive, so the
    cluster of that route does not matter.
    """
    anywhere = next(iter(gateway.processes))
    for method in (method for service in services for method in service.methods):
        if method.kind is CallKind.UPLOAD:
            for url in method.urls:
                if "{" in url:
                    raise ValueError(f"{url}: the URL of an upload must have no variables")
                yield _streamed({"path": url}, anywhere, CallKind.UPLOAD)
    wants_events = {"name": "accept", "string_match": {"contains": "text/event-stream"}}
    yield {
        "match": {"prefix": "/api/", "headers": [wants_events]},
        "route": _target(anywhere, CallKind.UNARY),
        "typed_per_filter_config": {TRANSCODER: transcoder(gateway, services, events=True)},
    }
    yield {"match": {"prefix": "/api/"}, "route": _target(anywhere, CallKind.UNARY)}
    for service in services:
        for method in service.methods:
            if method.kind is not CallKind.UNARY:
                yield _streamed({"path": method.path}, service.process, method.kind)
        yield _streamed({"prefix": f"/{service.name}/"}, service.process, CallKind.UNARY)
    # Health and reflection describe one process. Envoy passes a check on only when it has read all
    # of it: a slow check must not hold a place at the server, which Envoy's own checks need.
    yield _streamed({"path": "/grpc.health.v1.Health/Watch"}, anywhere, CallKind.WATCH)
    health = {"prefix": "/grpc.health.v1.Health/"}
    yield {"match": health, "route": _target(anywhere, CallKind.UNARY)}
    yield _streamed({"prefix": "/grpc.reflection."}, anywhere, CallKind.UNARY)


def _streamed(match: dict[str, Any], process: str, kind: CallKind) -> dict[str, Any]:
    """Return a route by which requests are passed on while they arrive."""
    kept = {"@type": f"{TYPES}filters.http.buffer.v3.BufferPerRoute", "disabled": True}
    return {
        "match": match,
        "route": _target(process, kind),
        "typed_per_filter_config": {BUFFER: kept},
    }


def _target(process: str, kind: CallKind) -> dict[str, Any]:
    """Return where calls go, and how long they may take."""
    route: dict[str, Any] = {
        "cluster": process,
        # This limit would count from the end of the request. The one below counts from its start.
        "timeout": "0s",
        # Retry only if the server cannot have seen the call.
        "retry_policy": {"retry_on": "connect-failure,refused-stream", "num_retries": 2},
    }
    if kind is CallKind.UNARY:
        route["max_stream_duration"] = {
            "max_stream_duration": seconds(UNARY_LIMIT),
            "grpc_timeout_header_max": seconds(LONGEST_DEADLINE),
        }
    if kind is CallKind.UPLOAD:
        route["max_stream_duration"] = {
            "max_stream_duration": seconds(UPLOAD_LIMIT),
            "grpc_timeout_header_max": seconds(UPLOAD_LIMIT),
        }
        route["idle_timeout"] = seconds(UPLOAD_IDLE)
    if kind is CallKind.WATCH:
        # As over gRPC, a watch ends with its deadline, if it has one. Without the second value,
        # Envoy would drop the deadline.
        route["max_stream_duration"] = {
            "max_stream_duration": "0s",
            "grpc_timeout_header_max": "0s",
        }
        route["idle_timeout"] = "0s"
    return route


def _no_transcoder() -> dict[str, Any]:
    return {
        "typed_per_filter_config": {
            TRANSCODER: {
                "@type": "type.googleapis.com/envoy.config.route.v3.FilterConfig",
                "disabled": True,
            }
        }
    }


def _cors(origins: Sequence[str]) -> dict[str, Any]:
    return {
        "@type": f"{TYPES}filters.http.cors.v3.CorsPolicy",
        "allow_origin_string_match": [{"exact": origin} for origin in origins],
        "allow_methods": "GET, POST, PATCH, DELETE",
        "allow_headers": "authorization, content-type, grpc-timeout, x-grpc-web, x-user-agent",
        "expose_headers": "grpc-message, grpc-status, grpc-status-details-bin, x-request-id",
        "max_age": "600",
    }
