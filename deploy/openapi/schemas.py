"""The JSON schemas of messages, as the JSON transcoder reads and writes them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Collection
from enum import StrEnum
from typing import Any, Final

from google.api.field_behavior_pb2 import FieldBehavior
from google.protobuf.descriptor_pb2 import FieldDescriptorProto

from outbox_server.deploy.openapi.descriptors import Descriptors, FieldOfMessage

Schema = dict[str, Any]
_Type = FieldDescriptorProto


class Direction(StrEnum):
    """Whether a message is sent to the server or returned by it."""

    INPUT = "input"
    OUTPUT = "output"


_INT32: Final = {"type": "integer", "format": "int32", "minimum": -(2**31), "maximum": 2**31 - 1}
_UINT32: Final = {"type": "integer", "format": "uint32", "minimum": 0, "maximum": 2**32 - 1}
# JSON numbers lose precision beyond 53 bits, so proto3 writes them as strings.
_INT64: Final = {"type": "string", "format": "int64", "pattern": "^-?[0-9]{1,19}$"}
_UINT64: Final = {"type": "string", "format": "uint64", "pattern": "^[0-9]{1,20}$"}
_SCALARS: Final[dict[int, Schema]] = {
    _Type.TYPE_DOUBLE: {"type": "number", "format": "double"},
    _Type.TYPE_FLOAT: {"type": "number", "format": "float"},
    _Type.TYPE_INT32: _INT32,
    _Type.TYPE_SINT32: _INT32,
    _Type.TYPE_SFIXED32: _INT32,
    _Type.TYPE_UINT32: _UINT32,
    _Type.TYPE_FIXED32: _UINT32,
    _Type.TYPE_INT64: _INT64,
    _Type.TYPE_SINT64: _INT64,
    _Type.TYPE_SFIXED64: _INT64,
    _Type.TYPE_UINT64: _UINT64,
    _Type.TYPE_FIXED64: _UINT64,
    _Type.TYPE_BOOL: {"type": "boolean"},
    _Type.TYPE_STRING: {"type": "string"},
    _Type.TYPE_BYTES: {"type": "string", "format": "byte", "contentEncoding": "base64"},
}
# Messages that are not objects in JSON.
WELL_KNOWN: Final[dict[str, Schema]] = {
    ".google.protobuf.Timestamp": {"type": "string", "format": "date-time"},
    ".google.protobuf.Duration": {
        "type": "string",
        "pattern": r"^-?[0-9]{1,12}(\.[0-9]{1,9})?s$",
        "examples": ["2s", "0.250s"],
    },
    # Names of fields, separated by commas. The server accepts snake_case, too.
    ".google.protobuf.FieldMask": {"type": "string", "examples": ["hourlyLimit,minGap"]},
    ".google.protobuf.Empty": {"type": "object"},
}
_NOT_INPUT: Final = (FieldBehavior.OUTPUT_ONLY, FieldBehavior.IDENTIFIER)


class Schemas:
    """Makes schemas, and collects the schemas of named types as components."""

    def __init__(self, descriptors: Descriptors, returned: Collection[str]) -> None:
        """`returned` are the full names of the messages that methods return."""
        self._descriptors = descriptors
        self.components: dict[str, Schema] = {}
        self._outputs: set[str] = set()
        for name in returned:
            self._collect(name)

    def reference(self, name: str, direction: Direction) -> Schema:
        """Return the schema of a message, mostly a reference to a component."""
        if name in WELL_KNOWN:
            return copy.deepcopy(WELL_KNOWN[name])
        component = self._component(name, direction)
        if component not in self.components:
            self.components[component] = {}  # for a message that contains itself
            self.components[component] = self.message(name, direction)
        return {"$ref": f"#/components/schemas/{component}"}

    def message(
        self,
        name: str,
        direction: Direction,
        *,
        without: Collection[str] = (),
        required: bool = True,
    ) -> Schema:
        """Return the schema of a message `without` some fields. Its types become components."""
        message = self._descriptors.messages[name]
        fields = [
            field
            for field in message.fields
            if field.name not in without and _is_in(field, direction)
        ]
        schema: Schema = {"type": "object"}
        if message.comment:
            schema["description"] = message.comment
        schema["properties"] = {field.name: self.field(field, direction) for field in fields}
        needed = [field.name for field in fields if required and _is_required(field, direction)]
        if needed:
            schema["required"] = needed
        # At most one field of a `oneof` may be set.
        pairs = [
            {"not": {"required": [one.name, other.name]}}
            for one, other in itertools.combinations(fields, 2)
            if one.oneof is not None and one.oneof == other.oneof
        ]
        if pairs:
            schema["allOf"] = pairs
        return schema

    def field(self, field: FieldOfMessage, direction: Direction) -> Schema:
        """Return the schema of a field, with its comment."""
        pair = self._descriptors.map_types(field)
        if pair is not None:
            values = self._value(pair[1], direction)
            schema: Schema = {"type": "object", "additionalProperties": values}
        elif field.repeated:
            schema = {"type": "array", "items": self._value(field, direction)}
        else:
            schema = self._value(field, direction)
        return schema | ({"description": field.comment} if field.comment else {})

    def is_object(self, field: FieldOfMessage) -> bool:
        """Return whether a field holds an object, whose fields have parameters of their own."""
        kind = field.proto
        return kind.type == _Type.TYPE_MESSAGE and kind.type_name not in WELL_KNOWN

    def _value(self, field: FieldOfMessage, direction: Direction) -> Schema:
        kind = field.proto.type
        if kind == _Type.TYPE_MESSAGE:
            return self.reference(field.proto.type_name, direction)
        if kind == _Type.TYPE_ENUM:
            return self._enum(field.proto.type_name)
        return dict(_SCALARS[kind])

    def _enum(self, name: str) -> Schema:
        component = _short(name)
        if component not in self.components:
            enum = self._descriptors.enums[name]
            meanings = "\n".join(
                f"- `{value}`: {' '.join(comment.split())}"
                for value, comment in enum.values.items()
            )
            self.components[component] = {
                "type": "string",
                "description": f"{enum.comment}\n\n{meanings}",
                "enum": list(enum.values),
            }
        return {"$ref": f"#/components/schemas/{component}"}

    def _component(self, name: str, direction: Direction) -> str:
        # A message that is sent and returned has two schemas: they differ in the fields that are
        # required, ignored or never returned.
        both = direction is Direction.INPUT and name in self._outputs
        return _short(name) + ("Input" if both else "")

    def _collect(self, name: str) -> None:
        if name in WELL_KNOWN or name in self._outputs:
            return
        self._outputs.add(name)
        for field in self._descriptors.messages[name].fields:
            if field.proto.type == _Type.TYPE_MESSAGE:
                self._collect(field.proto.type_name)


def _is_in(field: FieldOfMessage, direction: Direction) -> bool:
    if direction is Direction.INPUT:
        return not field.behaves(*_NOT_INPUT)
    return not field.behaves(FieldBehavior.INPUT_ONLY)


def _is_required(field: FieldOfMessage, direction: Direction) -> bool:
    if direction is Direction.INPUT:
        return field.behaves(FieldBehavior.REQUIRED)
    return field.always_printed


def _short(name: str) -> str:
    """Return a type's name without its package, such as `BadRequest.FieldViolation`."""
    parts = name.removeprefix(".").split(".")
    return ".".join(part for part in parts if part[:1].isupper())
