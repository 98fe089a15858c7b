"""No text that a server or another user wrote can control the terminal."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any, Final

import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from outbox_server.cli.failures import report
from outbox_server.cli.lazy import CommandFailed
from outbox_server.cli.output import (
    OutputFormat,
    print_json_line,
    print_rows,
    show,
    show_list,
    to_document,
)
from outbox_server.cli.terminal import note, printable, say

CLI: Final = Path(__file__).parents[2] / "cli"
PACKAGES: Final = Path(__file__).parents[2] / "protos" / "outbox" / "v1"
# Window title, colour, the C1 form of CSI, a carriage return that hides, a text from right to left,
# a space without width, and a NUL.
ESCAPES: Final = "a\x1b]0;X\x07\x1b[2J\x9b31m\rb\u202ec\u200bd\x00\x7f"


def filled(kind: Descriptor, depth: int = 0) -> Any:
    """Return a message with the escapes in every text."""
    message: Any = message_factory.GetMessageClass(kind)()
    for field in kind.fields:
        if field.type == FieldDescriptor.TYPE_STRING:
            if field.is_repeated:
                getattr(message, field.name).append(ESCAPES)
            else:
                setattr(message, field.name, ESCAPES)
        elif field.message_type is not None and depth < 4:
            if field.message_type.GetOptions().map_entry:
                if field.message_type.fields_by_name["value"].type == FieldDescriptor.TYPE_STRING:
                    getattr(message, field.name)[ESCAPES] = ESCAPES
            elif field.message_type.file.package == "outbox.v1":
                inner = filled(field.message_type, depth + 1)
                if field.is_repeated:
                    getattr(message, field.name).append(inner)
                else:
                    getattr(message, field.name).CopyFrom(inner)
    return message


def kinds() -> list[Descriptor]:
    found: list[Descriptor] = []
    for path in sorted(PACKAGES.glob("*.proto")):
        module = importlib.import_module(f"outbox.v1.{path.stem}_pb2")
        found += module.DESCRIPTOR.message_types_by_name.values()
    return found


def controls(text: str) -> str:
    return "".join(char for char in text if not char.isprintable() and char != "\n")


def test_no_text_of_a_message_controls_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    for kind in kinds():
        show_everywhere(kind)
        shown = capsys.readouterr()
        assert controls(shown.out) == "", kind.name
        assert controls(shown.err) == "", kind.name
        if any(field.type == FieldDescriptor.TYPE_STRING for field in kind.fields):
            assert "\\x1b]0;X" in shown.out or "\\u001b]0;X" in shown.out, kind.name


def show_everywhere(kind: Descriptor) -> None:
    message = filled(kind)
    for output in OutputFormat:
        show(message, output)
    print_json_line(to_document(message))
    for field in kind.fields:
        if field.is_repeated and field.message_type is not None:
            if field.message_type.GetOptions().map_entry:
                continue
            columns = [
                inner.name for inner in field.message_type.fields if inner.message_type is None
            ]
            for output in OutputFormat:
                show_list(message, field.name, columns, output, what="things")


def test_lines_rows_and_errors_do_not_control_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    say(ESCAPES)
    note(ESCAPES)
    print_rows(("name",), [(ESCAPES,)])
    report(CommandFailed(ESCAPES))
    shown = capsys.readouterr()
    assert controls(shown.out + shown.err) == ""
    assert shown.out.count("\\x1b]0;X") == 2
    assert shown.err.count("\\x1b]0;X") == 2


def test_line_breaks_and_letters_of_all_languages_stay() -> None:
    assert printable("Ännä\n日本\nعربى") == "Ännä\n日本\nعربى"


# The progress of a run, the live view and the chart draw on a terminal themselves.
DRAWERS: Final = {
    "terminal.py": "makes texts printable",
    "output.py": "escapes JSON",
    "series.py": "plotext's chart, whose colours are escapes",
}

WRITERS: Final = (
    "print",
    "typer.echo",
    "typer.secho",
    "click.echo",
    "sys.stdout.write",
    "sys.stderr.write",
    "sys.stdout.buffer.write",
)


def test_every_command_prints_through_these_functions() -> None:
    found = [
        f"{path.name}:{node.lineno}"
        for path in sorted(CLI.glob("*.py"))
        if path.name not in DRAWERS
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in WRITERS
    ]
    assert found == []
