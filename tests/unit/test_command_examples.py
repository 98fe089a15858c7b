"""Every `outbox ...` command shown in --help, the README or the documents parses."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

from outbox_server.cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A line of a code block, with what it is preceded by, or a piece of code within a sentence.
SHOWN = re.compile(r"^(?:[A-Z_]+=\S* |export \w+=\$\()*(?:\.venv/bin/)?outbox (.*)$")
INLINE = re.compile(r"`(?:[A-Z_]+=\S* )?(?:\.venv/bin/)?outbox ([^`]+)`")


def commands(command: Any, name: str = "outbox") -> Iterator[tuple[str, Any]]:
    """Yield every command with its whole name."""
    yield name, command
    for each in command.list_commands(None) if hasattr(command, "list_commands") else ():
        _, found, _ = command.resolve_command(None, [each])
        yield from commands(found, f"{name} {each}")


def of_help() -> Iterator[tuple[str, str]]:
    for name, command in commands(get_command(app)):
        for paragraph in re.split(r"\n\s*\n", command.help or ""):
            if paragraph.lstrip("\b\n ").startswith("$ outbox "):
                text = paragraph.replace("\\\n", " ").replace("\n", " ")
                yield name, text.partition("$ outbox ")[2]


def of_pages() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                if found := SHOWN.match(line):
                    shown = re.split(r"\s+#|\)$|\)\s| &$| [|>] ", found[1])[0]
                    yield page.name, shown
        for found in INLINE.finditer(
            re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        ):
            yield page.name, found[1].replace("\n", " ")


@pytest.mark.parametrize(("where", "example"), [*of_help(), *of_pages()])
def test_every_command_shown_in_the_docs_parses(where: str, example: str) -> None:  # noqa: ARG001 - its name
    context: Any = None
    command: Any = get_command(app)
    arguments = [word for word in shlex.split(example) if word != "..."]
    while arguments or context is None:
        try:
            context = command.make_context(command.name, arguments, parent=context)
        except typer.Exit:
            return  # --help
        if not hasattr(command, "resolve_command"):
            return
        arguments = [*context._protected_args, *context.args]
        if arguments:
            _, command, arguments = command.resolve_command(context, arguments)
    # A command or a group that is named and not called.


def test_the_docs_contain_command_examples() -> None:
    assert len([*of_help()]) > 20
    assert len([*of_pages()]) > 40
