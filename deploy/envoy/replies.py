"""The answers that Envoy gives itself, in the form of the services' errors (google.rpc.Status)."""

from __future__ import annotations

from typing import Any, Final

import grpc

_Code = grpc.StatusCode
# For each HTTP status that Envoy answers by itself: the gRPC code and the stable reason.
REASONS: Final = {
    400: (_Code.INVALID_ARGUMENT, "GATEWAY_BAD_REQUEST"),
    403: (_Code.PERMISSION_DENIED, "GATEWAY_FORBIDDEN"),
    404: (_Code.NOT_FOUND, "GATEWAY_NO_SUCH_CALL"),
    408: (_Code.DEADLINE_EXCEEDED, "GATEWAY_TIMEOUT"),
    413: (_Code.RESOURCE_EXHAUSTED, "GATEWAY_BODY_TOO_LARGE"),
    415: (_Code.INVALID_ARGUMENT, "GATEWAY_BAD_REQUEST"),
    426: (_Code.INVALID_ARGUMENT, "GATEWAY_BAD_REQUEST"),
    429: (_Code.RESOURCE_EXHAUSTED, "GATEWAY_OVERLOADED"),
    431: (_Code.RESOURCE_EXHAUSTED, "GATEWAY_HEADERS_TOO_LARGE"),
    500: (_Code.INTERNAL, "GATEWAY_INTERNAL"),
    502: (_Code.UNAVAILABLE, "GATEWAY_UNAVAILABLE"),
    503: (_Code.UNAVAILABLE, "GATEWAY_UNAVAILABLE"),
    504: (_Code.DEADLINE_EXCEEDED, "GATEWAY_TIMEOUT"),
}
# A call over REST has the content type of gRPC, too, once it is transcoded.
_NOT_GRPC: Final = {
    "name": "content-type",
    "string_match": {"prefix": "application/grpc"},
    "invert_match": True,
    "treat_missing_header_as_empty": True,
}
_TRANSCODED: Final = {"name": "x-envoy-original-path", "present_match": True}


def local_replies() -> dict[str, Any]:
    """Return the configuration of Envoy's own answers to calls over REST.

    An answer to a gRPC call stays as it is: its text is the status message.
    """
    return {"mappers": [_mapper(status) for status in REASONS]}


def _header(header: dict[str, Any]) -> dict[str, Any]:
    return {"header_filter": {"header": header}}


def _mapper(status: int) -> dict[str, Any]:
    code, reason = REASONS[status]
    text = "%LOCAL_REPLY_BODY%"
    info = {
        "@type": "type.googleapis.com/google.rpc.ErrorInfo",
        "reason": reason,
        "domain": "outbox",
        "metadata": {"envoy": "%RESPONSE_CODE_DETAILS%"},
    }
    return {
        "filter": {
            "and_filter": {
                "filters": [
                    {
                        "status_code_filter": {
                            "comparison": {
                                "op": "EQ",
                                "value": {"default_value": status, "runtime_key": "outbox.none"},
                            }
                        }
                    },
                    {"or_filter": {"filters": [_header(_NOT_GRPC), _header(_TRANSCODED)]}},
                ]
            }
        },
        "body_format_override": {
            "json_format": {"code": code.value[0], "message": text, "details": [info]}
        },
    }
