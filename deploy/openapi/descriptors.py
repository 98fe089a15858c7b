"""The messages, enums and services of a descriptor set, by name, with their comments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from google.api.field_behavior_pb2 import FieldBehavior, field_behavior
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
    ServiceDescriptorProto,
)

# Field numbers in descriptor.proto, of which the path of a comment consists.
_MESSAGES, _ENUMS, _SERVICES = 4, 5, 6
_FIELDS, _NESTED, _NESTED_ENUMS, _VALUES, _METHODS = 2, 3, 4, 2, 2

_Path = tuple[int, ...]
REPEATED: Final = FieldDescriptorProto.LABEL_REPEATED


@dataclass(frozen=True, slots=True)
class FieldOfMessage:
    """A field and its comment."""

    proto: FieldDescriptorProto
    comment: str

    @property
    def name(self) -> str:
        """Its name."""
        return self.proto.name

    @property
    def repeated(self) -> bool:
        """Whether it is a list or a map."""
        return self.proto.label == REPEATED

    @property
    def oneof(self) -> int | None:
        """The number of the `oneof` that it belongs to, if any."""
        if self.proto.proto3_optional or not self.proto.HasField("oneof_index"):
            return None
        return self.proto.oneof_index

    @property
    def always_printed(self) -> bool:
        """Whether a message has it in JSON even if its value is the default one."""
        if self.repeated:
            return True
        is_message = self.proto.type == FieldDescriptorProto.TYPE_MESSAGE
        return not is_message and not self.proto.HasField("oneof_index")

    def behaves(self, *behaviours: FieldBehavior.ValueType) -> bool:
        """Return whether it has one of these behaviours."""
        return bool(set(behaviours).intersection(self.proto.options.Extensions[field_behavior]))


@dataclass(frozen=True, slots=True)
class MessageType:
    """A message type, its comment and its fields."""

    name: str
    proto: DescriptorProto
    comment: str
    fields: tuple[FieldOfMessage, ...]


@dataclass(frozen=True, slots=True)
class EnumType:
    """An enum, its comment, and the comments of its values by their names."""

    name: str
    comment: str
    values: dict[str, str]


@dataclass(frozen=True, slots=True)
class MethodOfService:
    """A method and its comment."""

    proto: MethodDescriptorProto
    comment: str


@dataclass(frozen=True, slots=True)
class ServiceType:
    """A service, its comment and its methods."""

    name: str
    comment: str
    methods: tuple[MethodOfService, ...]


class Descriptors:
    """Finds types by their full names, which begin with a dot, as descriptors write them."""

    def __init__(self, descriptors: bytes, package: str) -> None:
        """Read a descriptor set with source information. `services` are the ones in `package`."""
        self.messages: dict[str, MessageType] = {}
        self.enums: dict[str, EnumType] = {}
        self.services: list[ServiceType] = []
        for file in FileDescriptorSet.FromString(descriptors).file:
            comments = _comments_of(file)
            prefix = f".{file.package}"
            for index, message in enumerate(file.message_type):
                self._add_message(prefix, message, (_MESSAGES, index), comments)
            for index, enum in enumerate(file.enum_type):
                self._add_enum(prefix, enum, (_ENUMS, index), comments)
            if file.package == package:
                for index, service in enumerate(file.service):
                    self.services.append(_service(service, (_SERVICES, index), comments))

    def map_types(self, field: FieldOfMessage) -> tuple[FieldOfMessage, FieldOfMessage] | None:
        """Return the key and the value of a map; None for any other field."""
        entry = self.messages.get(field.proto.type_name)
        if entry is None or not entry.proto.options.map_entry:
            return None
        key, value = entry.fields
        return key, value

    def _add_message(
        self, prefix: str, message: DescriptorProto, path: _Path, comments: dict[_Path, str]
    ) -> None:
        name = f"{prefix}.{message.name}"
        self.messages[name] = MessageType(
            name,
            message,
            comments.get(path, ""),
            tuple(
                FieldOfMessage(field, comments.get((*path, _FIELDS, index), ""))
                for index, field in enumerate(message.field)
            ),
        )
        for index, nested in enumerate(message.nested_type):
            self._add_message(name, nested, (*path, _NESTED, index), comments)
        for index, enum in enumerate(message.enum_type):
            self._add_enum(name, enum, (*path, _NESTED_ENUMS, index), comments)

    def _add_enum(
        self, prefix: str, enum: EnumDescriptorProto, path: _Path, comments: dict[_Path, str]
    ) -> None:
        name = f"{prefix}.{enum.name}"
        values = {
            value.name: comments.get((*path, _VALUES, index), "")
            for index, value in enumerate(enum.value)
        }
        self.enums[name] = EnumType(name, comments.get(path, ""), values)


def _service(
    service: ServiceDescriptorProto, path: _Path, comments: dict[_Path, str]
) -> ServiceType:
    methods = tuple(
        MethodOfService(method, comments.get((*path, _METHODS, index), ""))
        for index, method in enumerate(service.method)
    )
    return ServiceType(service.name, comments.get(path, ""), methods)


def _comments_of(file: FileDescriptorProto) -> dict[_Path, str]:
    return {
        tuple(place.path): "\n".join(_lines(place.leading_comments))
        for place in file.source_code_info.location
        if place.leading_comments
    }


def _lines(comment: str) -> Iterator[str]:
    for line in comment.strip().splitlines():
        yield line.strip()
