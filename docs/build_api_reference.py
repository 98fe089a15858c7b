"""Writes docs/api.md from the protos' descriptor set: `make docs`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from google.api.annotations_pb2 import http
from google.api.field_behavior_pb2 import FieldBehavior, field_behavior
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
    MethodOptions,
)

ROOT: Final = Path(__file__).parent.parent
SOURCE: Final = ROOT / "client" / "src" / "outbox" / "v1" / "outbox.binpb"
TARGET: Final = ROOT / "docs" / "api.md"
PACKAGE: Final = "outbox.v1"
# Field numbers in descriptor.proto: what a path of a comment is made of.
_MESSAGES, _ENUMS, _SERVICES = 4, 5, 6
_FIELDS, _NESTED, _NESTED_ENUMS, _VALUES, _METHODS = 2, 3, 4, 2, 2
_VERBS: Final = ("get", "post", "patch", "delete", "put")

# What a client may do after a call without an answer, by the method's level.
_REPEATS: Final = {
    MethodOptions.NO_SIDE_EFFECTS: "Only reads: may be repeated.",
    MethodOptions.IDEMPOTENT: "May be repeated: a second call changes nothing more.",
    MethodOptions.IDEMPOTENCY_UNKNOWN: "Not to be repeated without a `request_id`.",
}

Path_ = tuple[int, ...]


class PackageReference:
    """The reference of one package."""

    def __init__(self, files: Sequence[FileDescriptorProto]) -> None:
        self._files = files
        self._lines: list[str] = []

    def text(self) -> str:
        """Return it as Markdown."""
        self._lines = [
            "# API reference",
            "",
            "Made from `protos/outbox/v1` by `make docs`; the words are the protos' own.",
            "Errors are explained in [errors.md](errors.md).",
            "",
        ]
        for file, comments in self._with_comments():
            for index, service in enumerate(file.service):
                place = (_SERVICES, index)
                self._head(f"## {service.name}", comments.get(place, ""))
                for number, method in enumerate(service.method):
                    self._method(method, comments.get((*place, _METHODS, number), ""))
        self._lines += ["## Messages", ""]
        for file, comments in self._with_comments():
            for index, message in enumerate(file.message_type):
                self._message(message, message.name, (_MESSAGES, index), comments)
        self._lines += ["## Enums", ""]
        for file, comments in self._with_comments():
            for index, enum in enumerate(file.enum_type):
                self._enum(enum, enum.name, (_ENUMS, index), comments)
        return "\n".join(self._lines).rstrip() + "\n"

    def _with_comments(self) -> Iterator[tuple[FileDescriptorProto, Mapping[Path_, str]]]:
        for file in self._files:
            yield (
                file,
                {
                    tuple(place.path): place.leading_comments.strip()
                    for place in file.source_code_info.location
                    if place.leading_comments
                },
            )

    def _head(self, title: str, comment: str) -> None:
        self._lines += [title, "", _paragraphs(comment), ""]

    def _method(self, method: MethodDescriptorProto, comment: str) -> None:
        wanted = f"{'stream ' * method.client_streaming}{_link(method.input_type)}"
        answer = f"{'stream ' * method.server_streaming}{_link(method.output_type)}"
        self._head(f"### {method.name}", comment)
        self._lines += [f"{wanted} → {answer}", ""]
        rule = method.options.Extensions[http]
        for each in (rule, *rule.additional_bindings):
            verb = each.WhichOneof("pattern")
            if verb in _VERBS:
                self._lines += [f"`{verb.upper()} {getattr(each, verb)}`", ""]
        self._lines += [_REPEATS[method.options.idempotency_level], ""]

    def _message(
        self, message: DescriptorProto, name: str, place: Path_, comments: Mapping[Path_, str]
    ) -> None:
        if message.options.map_entry:
            return
        self._head(f"### {name}", comments.get(place, ""))
        if message.field:
            self._lines += ["| field | type | |", "| --- | --- | --- |"]
        for number, field in enumerate(message.field):
            said = _cell(comments.get((*place, _FIELDS, number), ""))
            notes = _behaviour(field) + _choice(message, field)
            self._lines.append(f"| `{field.name}` | {_type(message, field)} | {notes}{said} |")
        self._lines.append("")
        for number, nested in enumerate(message.nested_type):
            self._message(nested, f"{name}.{nested.name}", (*place, _NESTED, number), comments)
        for number, enum in enumerate(message.enum_type):
            self._enum(enum, f"{name}.{enum.name}", (*place, _NESTED_ENUMS, number), comments)

    def _enum(
        self, enum: EnumDescriptorProto, name: str, place: Path_, comments: Mapping[Path_, str]
    ) -> None:
        self._head(f"### {name}", comments.get(place, ""))
        self._lines += ["| value | |", "| --- | --- |"]
        for number, value in enumerate(enum.value):
            said = _cell(comments.get((*place, _VALUES, number), ""))
            self._lines.append(f"| `{value.name}` | {said} |")
        self._lines.append("")


def _paragraphs(comment: str) -> str:
    return "\n".join(line.strip() for line in comment.splitlines())


def _cell(comment: str) -> str:
    paragraphs = [" ".join(part.split()) for part in comment.split("\n\n")]
    return "<br>".join(part.replace("|", "\\|") for part in paragraphs)


def _short(full_name: str) -> str:
    return full_name.removeprefix(f".{PACKAGE}.").removeprefix(".")


def _link(full_name: str) -> str:
    name = _short(full_name)
    if not full_name.startswith(f".{PACKAGE}."):
        return f"`{name}`"
    return f"[{name}](#{name.lower().replace('.', '')})"


def _type(message: DescriptorProto, field: FieldDescriptorProto) -> str:
    for nested in message.nested_type:
        if nested.options.map_entry and field.type_name.endswith(f".{nested.name}"):
            key, value = nested.field
            return f"map of {_type(nested, key)} to {_type(nested, value)}"
    named = field.type_name and _link(field.type_name)
    plain = FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    repeated = field.label == FieldDescriptorProto.LABEL_REPEATED
    return f"{'repeated ' * repeated}{named or plain}"


def _behaviour(field: FieldDescriptorProto) -> str:
    names = {
        FieldBehavior.REQUIRED: "Required. ",
        FieldBehavior.OUTPUT_ONLY: "Output only. ",
        FieldBehavior.INPUT_ONLY: "Input only. ",
        FieldBehavior.IMMUTABLE: "Immutable. ",
    }
    return "".join(names.get(each, "") for each in field.options.Extensions[field_behavior])


def _choice(message: DescriptorProto, field: FieldDescriptorProto) -> str:
    if not field.HasField("oneof_index") or field.proto3_optional:
        return ""
    return f"One of `{message.oneof_decl[field.oneof_index].name}`. "


def build(source: Path = SOURCE) -> str:
    """Return the page."""
    found = FileDescriptorSet.FromString(source.read_bytes())
    return PackageReference([file for file in found.file if file.package == PACKAGE]).text()


if __name__ == "__main__":
    TARGET.write_text(build(), encoding="utf-8")
    sys.stderr.write(f"{TARGET} written\n")
