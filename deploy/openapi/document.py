"""The OpenAPI 3.1 document: the calls of the REST API, from the HTTP rules of the methods."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

from google.api.field_behavior_pb2 import FieldBehavior
from google.api.http_pb2 import HttpRule

from outbox_server.deploy.contract import PACKAGE, rules_of
from outbox_server.deploy.openapi.descriptors import (
    Descriptors,
    FieldOfMessage,
    MessageType,
    MethodOfService,
    ServiceType,
)
from outbox_server.deploy.openapi.schemas import Direction, Schema, Schemas

_VARIABLE: Final = re.compile(r"{([^{}=]+)(?:=[^{}]*)?}")
_HTTP_BODY: Final = ".google.api.HttpBody"
_DETAILS: Final = ("ErrorInfo", "BadRequest", "RetryInfo")
_DESCRIPTION: Final = """\
The REST API of Outbox: the gRPC services of the package `outbox.v1` as JSON over HTTP.

Every error is a `Status`, with a stable `reason` in its `ErrorInfo`. Fields of a JSON body that the
API does not know are ignored; unknown query parameters are refused. 64-bit integers are strings.
Methods that stream return one JSON document per line or, for `Accept: text/event-stream`,
server-sent events. The last document has `done` set; a stream that ends without it was interrupted.
"""


def build_document(descriptors: bytes, version: str) -> dict[str, Any]:
    """Return the document of the services in a descriptor set with comments."""
    found = Descriptors(descriptors, PACKAGE)
    methods = [method for service in found.services for method in service.methods]
    schemas = Schemas(
        found,
        [
            *(method.proto.output_type for method in methods),
            *(f".google.rpc.{name}" for name in _DETAILS),
        ],
    )
    paths: dict[str, Any] = {}
    for service in found.services:
        for url, verb, operation in _Calls(found, schemas, service).operations():
            paths.setdefault(url, {})[verb] = operation
    status = _status(schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Outbox",
            "version": version,
            "description": _DESCRIPTION,
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/"}],
        "security": [{"key": []}, {}],
        "tags": [
            {"name": service.name, "description": service.comment} for service in found.services
        ],
        "paths": paths,
        "components": {
            "schemas": dict(sorted((schemas.components | {"Status": status}).items())),
            "responses": {
                "Error": {
                    "description": "An error. The HTTP status follows from `code`.",
                    "content": {
                        "application/json": {"schema": {"$ref": "#/components/schemas/Status"}}
                    },
                }
            },
            "securitySchemes": {
                "key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "An API key, made with `outbox keys create`.",
                }
            },
        },
    }


class _Calls:
    """The operations of one service."""

    def __init__(self, found: Descriptors, schemas: Schemas, service: ServiceType) -> None:
        self._found = found
        self._schemas = schemas
        self._service = service

    def operations(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Yield the URL template, the verb and the operation of every HTTP rule."""
        for method in self._service.methods:
            for number, (verb, template, rule) in enumerate(rules_of(method.proto), start=1):
                url = _VARIABLE.sub(lambda found: f"{{{_last(found[1])}}}", template)
                suffix = "" if number == 1 else str(number)
                yield url, verb, self._operation(method, verb, template, rule, suffix)

    def _operation(
        self, method: MethodOfService, verb: str, template: str, rule: HttpRule, suffix: str
    ) -> dict[str, Any]:
        request = self._found.messages[method.proto.input_type]
        in_path = _VARIABLE.findall(template)
        operation: dict[str, Any] = {
            "operationId": method.proto.name + suffix,
            "tags": [self._service.name],
            "summary": _first_sentence(method.comment),
            "description": method.comment,
            "parameters": [self._path_parameter(request, name) for name in in_path],
        }
        if rule.body:
            operation["requestBody"] = self._body(method, request, rule.body, verb, in_path)
        if rule.body != "*":
            taken = {*in_path, rule.body}
            operation["parameters"] += self._query(request, taken, "", needed=True)
        operation["responses"] = {
            "200": self._response(method),
            "default": {"$ref": "#/components/responses/Error"},
        }
        return operation

    def _path_parameter(self, request: MessageType, name: str) -> dict[str, Any]:
        message = request
        *parents, last = name.split(".")
        for parent in parents:
            message = self._found.messages[_field(message, parent).proto.type_name]
        field = _field(message, last)
        schema = self._schemas.field(field, Direction.INPUT)
        described = schema.pop("description", "")
        return {
            "name": last,
            "in": "path",
            "required": True,
            "description": described,
            "schema": schema | {"minLength": 1},
        }

    def _query(
        self, message: MessageType, taken: set[str], prefix: str, *, needed: bool
    ) -> list[dict[str, Any]]:
        chosen = {field.oneof for field in message.fields if field.name in taken and not prefix} - {
            None
        }
        parameters: list[dict[str, Any]] = []
        for field in message.fields:
            name = f"{prefix}{field.name}"
            if name in taken or field.oneof in chosen:
                continue
            required = needed and field.behaves(FieldBehavior.REQUIRED)
            if not self._schemas.is_object(field):
                parameters.append(self._query_parameter(field, name, required=required))
            elif not field.repeated:
                inner = self._found.messages[field.proto.type_name]
                parameters += self._query(inner, taken, f"{name}.", needed=required)
        return parameters

    def _query_parameter(
        self, field: FieldOfMessage, name: str, *, required: bool
    ) -> dict[str, Any]:
        schema = self._schemas.field(field, Direction.INPUT)
        described = schema.pop("description", "")
        found = {"name": name, "in": "query", "description": described, "schema": schema}
        return found | ({"required": True} if required else {})

    def _body(
        self,
        method: MethodOfService,
        request: MessageType,
        body: str,
        verb: str,
        in_path: list[str],
    ) -> dict[str, Any]:
        if body == "*":
            if in_path:
                schema = self._schemas.message(request.name, Direction.INPUT, without=in_path)
            else:
                schema = self._schemas.reference(request.name, Direction.INPUT)
            if method.proto.client_streaming:
                schema = {"type": "array", "items": schema}
            needed = any(
                field.behaves(FieldBehavior.REQUIRED)
                for field in request.fields
                if field.name not in in_path
            )
            return {"required": needed, "content": {"application/json": {"schema": schema}}}
        field = _field(request, body)
        if field.proto.type_name == _HTTP_BODY:
            content: Schema = {
                "text/csv": {"schema": {"type": "string", "contentMediaType": "text/csv"}}
            }
        elif verb == "patch":
            # A PATCH has only the fields that change.
            schema = self._schemas.message(field.proto.type_name, Direction.INPUT, required=False)
            content = {"application/json": {"schema": schema}}
        else:
            schema = self._schemas.reference(field.proto.type_name, Direction.INPUT)
            content = {"application/json": {"schema": schema}}
        return {"description": field.comment, "required": True, "content": content}

    def _response(self, method: MethodOfService) -> dict[str, Any]:
        schema = self._schemas.reference(method.proto.output_type, Direction.OUTPUT)
        content = {"application/json": {"schema": schema}}
        if not method.proto.server_streaming:
            return {"description": "The call succeeded.", "content": content}
        return {
            "description": "The call succeeded. The body is a stream: one JSON document per line, "
            "or one per server-sent event.",
            "content": content | {"text/event-stream": {"schema": schema}},
        }


def _status(schemas: Schemas) -> Schema:
    details = []
    for name in _DETAILS:
        schema = schemas.message(f".google.rpc.{name}", Direction.OUTPUT)
        kind = {"const": f"type.googleapis.com/google.rpc.{name}"}
        schema["properties"] = {"@type": kind, **schema["properties"]}
        schema["required"] = ["@type", *schema.get("required", [])]
        schemas.components[name] = schema
        details.append({"$ref": f"#/components/schemas/{name}"})
    return {
        "type": "object",
        "description": "An error (google.rpc.Status).",
        "properties": {
            "code": {
                "type": "integer",
                "description": "The gRPC status code, such as 3 for INVALID_ARGUMENT.",
                "minimum": 1,
                "maximum": 16,
            },
            "message": {"type": "string", "description": "The error, for people. May change."},
            "details": {
                "type": "array",
                "description": "The error, for programs. Empty if gRPC itself refused the call.",
                "items": {"anyOf": details},
            },
        },
        "required": ["code", "message", "details"],
    }


def _last(path: str) -> str:
    """Return the name of a URL's variable. All URLs of a resource use the same name for its id."""
    return path.rpartition(".")[2]


def _field(message: MessageType, name: str) -> FieldOfMessage:
    return next(field for field in message.fields if field.name == name)


def _first_sentence(comment: str) -> str:
    paragraph = " ".join(comment.partition("\n\n")[0].split())
    return re.split(r"(?<=[.!?])\s", paragraph, maxsplit=1)[0].rstrip(".")
