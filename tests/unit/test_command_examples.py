"""Every `outbox ...` command shown in --help, the README or the documents parses."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

from outbox_server.cli import lazy
from outbox_server.cli.main import app
from tests.command_tree import examples

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A line of a code block, with a possible prefix, or a piece of code within a sentence.
SHOWN = re.compile(r"^(?:[A-Z_]+=\S* |(?:export )?\w+=\$\()*(?:\.venv/bin/)?outbox (.*)$")
# A terminal has 80 columns, and help begins and ends with an empty one.
TERMINAL = 78
INLINE = re.compile(r"`(?:[A-Z_]+=\S* )?(?:\.venv/bin/)?outbox ([^`]+)`")


@pytest.fixture(scope="module")
def outbox() -> Iterator[Any]:
    """The root of the command tree. Each group is built once, not for every example."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lazy, "command_of", cache(get_command))
        yield get_command(app)


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


def parse(command: Any, example: str) -> None:
    """Parse an example as the command line does, from the root of the command tree."""
    context: Any = None
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
    # The name of a command or group that is not called.


# One test for all examples: collecting them imports every command, which takes a second.
def test_every_command_shown_in_help_parses(outbox: Any, subtests: pytest.Subtests) -> None:
    shown = list(examples())
    assert len(shown) > 20
    for where, example in shown:
        with subtests.test(f"{where}: {example}"):
            found = SHOWN.match(example.replace("\\\n", " "))
            assert found
            parse(outbox, found[1].removesuffix(")"))


def test_an_example_in_help_can_be_copied_from_a_terminal_of_80_columns() -> None:
    for where, example in examples():
        *first, last = f"$ {example}".splitlines()
        assert all(line.endswith(" \\") for line in first), where
        assert all(len(line) <= TERMINAL for line in (*first, last)), where


def test_every_command_shown_in_the_docs_parses(outbox: Any, subtests: pytest.Subtests) -> None:
    examples = list(of_pages())
    assert len(examples) > 40
    for where, example in examples:
        with subtests.test(f"{where}: {example}"):
            parse(outbox, example)
