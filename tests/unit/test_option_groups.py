"""Options that are defined once for several commands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from outbox_server.cli.option_groups import with_option_groups


@dataclass(frozen=True, kw_only=True)
class Inner:
    """A group within a group."""

    depth: Annotated[int, typer.Option("--depth")] = 1


@dataclass(frozen=True, kw_only=True)
class Outer:
    """Options of two commands."""

    name: Annotated[str, typer.Option("--name")] = "none"
    inner: Inner


app = typer.Typer()


@app.command()
@with_option_groups
def first(word: Annotated[str, typer.Argument()], *, outer: Outer) -> None:
    typer.echo(f"{word} {outer}")


@app.command()
@with_option_groups
def second(*, loud: Annotated[bool, typer.Option("--loud")] = False, outer: Outer) -> None:
    typer.echo(f"{loud} {outer}")


@pytest.mark.parametrize(
    ("words", "printed"),
    [
        (["first", "hello"], f"hello {Outer(inner=Inner())}"),
        (
            ["first", "hello", "--depth", "2", "--name", "x"],
            f"hello {Outer(name='x', inner=Inner(depth=2))}",
        ),
        (["second", "--loud", "--name", "x"], f"True {Outer(name='x', inner=Inner())}"),
    ],
)
def test_two_commands_share_the_options_of_one_group(words: list[str], printed: str) -> None:
    done = CliRunner().invoke(app, words)
    assert (done.exit_code, done.output.strip()) == (0, printed)


def test_a_value_of_the_wrong_type_is_refused() -> None:
    assert CliRunner().invoke(app, ["first", "hello", "--depth", "deep"]).exit_code == 2
