"""Every regular expression of ours takes linear time, also for texts made to slow it down.

They are found by reading the source: a new one is tested by default. It takes too long for the unit
tests.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import pytest

from tests.hostile_patterns import SlowPatternError, check_linear

ROOT: Final = Path(__file__).parents[2]
# Folder and package. Not release/, bench/ and docs/: they read our own files.
FOLDERS: Final = {
    "shared": "outbox_server.shared",
    "services": "outbox_server.services",
    "cli": "outbox_server.cli",
    "deploy": "outbox_server.deploy",
    "client/src/outbox_client": "outbox_client",
}
METHODS: Final = ("match", "fullmatch", "search", "sub", "subn", "split", "findall", "finditer")
# What a file contains if it uses an expression. Parsing all files would take each run a second.
IN_SOURCE: Final = re.compile(rf"\.\s*(?:compile|{'|'.join(METHODS)})\b")
# Methods that try each place of a text do the same work.
ANCHORED: Final = ("match", "fullmatch")
# Expressions that a function builds, by file and function: examples of them.
BUILT: Final[dict[tuple[str, str], list[tuple[str, str]]]] = {
    # Codes such as 5.4.* and 4.2.7xx of a rule, which have a fixed form.
    ("shared/smtp/reply_rules.py", "_enhanced"): [
        (r"5\.4\.[0-9]{1,3}|5\.[0-9]{1,3}\.[0-9]{1,3}|4\.2\.7[0-9][0-9]", "fullmatch")
    ],
}


@dataclass(frozen=True)
class Expression:
    """A regular expression of a file, and the methods that are called on it."""

    where: str
    pattern: re.Pattern[Any]
    methods: tuple[str, ...]


@cache
def sources() -> dict[str, ast.Module]:
    found = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "_sync" not in path.parts and "migrations" not in path.parts:
                source = path.read_text(encoding="utf-8")
                if IN_SOURCE.search(source):
                    found[str(path.relative_to(ROOT))] = ast.parse(source)
    return found


def module_of(name: str) -> str:
    for folder, package in FOLDERS.items():
        if name.startswith(f"{folder}/"):
            rest = name.removeprefix(f"{folder}/").removesuffix(".py").replace("/", ".")
            return f"{package}.{rest}".removesuffix(".__init__")
    raise LookupError(name)


@cache
def uses() -> dict[tuple[str, str], set[str]]:
    """Return the methods that are called on each name, by file; a public name's file is ""."""
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for file, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in METHODS:
                base = node.value
                if isinstance(base, ast.Name):
                    found[file, base.id].add(node.attr)
                    found["", base.id].add(node.attr)
                elif isinstance(base, ast.Attribute):
                    found["", base.attr].add(node.attr)
    return found


def is_call_of_re(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "re"
        and node.func.attr in ("compile", *METHODS)
    )


def expressions() -> Iterator[Expression]:
    for name, tree in sources().items():
        at_top = set()
        for statement in tree.body:
            if not isinstance(statement, ast.Assign | ast.AnnAssign):
                continue
            value = statement.value
            if value is None or not is_call_of_re(value):
                continue
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            (target,) = targets
            assert isinstance(target, ast.Name), f"{name}:{statement.lineno}"
            at_top.add(id(value))
            pattern = getattr(importlib.import_module(module_of(name)), target.id)
            private = target.id.startswith("_")
            methods = uses().get((name if private else "", target.id), set())
            yield Expression(f"{name}:{target.id}", pattern, tuple(methods or METHODS[:3]))
        for function, node in calls_in_functions(name):
            if id(node) in at_top or (name, function) in BUILT:
                continue
            text = text_of(node.args[0])
            assert text is not None, (
                f"{name}:{node.lineno}: a regular expression that is built in a function needs an "
                "example in BUILT"
            )
            assert isinstance(node.func, ast.Attribute)
            used = (node.func.attr,) if node.func.attr in METHODS else uses_of(name, tree, node)
            yield Expression(f"{name}:{node.lineno}", re.compile(text), used)
    for (name, function), examples in BUILT.items():
        for pattern, method in examples:
            yield Expression(f"{name}:{function}", re.compile(pattern), (method,))


def uses_of(name: str, tree: ast.Module, call: ast.Call) -> tuple[str, ...]:
    """Return the methods that are called on the variable that gets the result of this call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and node.value is call:
            (target,) = node.targets
            if isinstance(target, ast.Name):
                return tuple(uses()[name, target.id])
    return METHODS[:3]


def text_of(node: ast.expr) -> Any:
    """Return the text of a constant, or of an f-string whose values are plain words."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else "key" for part in node.values]
        return "".join(map(str, parts))
    return None


@cache
def calls_in_functions(name: str) -> list[tuple[str, ast.Call]]:
    """Return the calls of `re` in a file, each with the name of its innermost function."""

    def walk(node: ast.AST, function: str) -> Iterator[tuple[str, ast.Call]]:
        for child in ast.iter_child_nodes(node):
            inside = function
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                inside = child.name
            if isinstance(child, ast.Call) and is_call_of_re(child):
                yield inside, child
            yield from walk(child, inside)

    return list(walk(sources()[name], ""))


def distinct(methods: tuple[str, ...]) -> list[str]:
    """Return one method of each kind."""
    anchored = [one for one in methods if one in ANCHORED]
    return [*anchored, *[one for one in methods if one not in ANCHORED][:1]]


ALL: Final = list(expressions())


@pytest.mark.parametrize("one", ALL, ids=lambda one: one.where)
def test_an_expression_takes_linear_time(one: Expression) -> None:
    check_linear(one.pattern, distinct(one.methods))


def test_all_expressions_are_found() -> None:
    calls = sum(1 for tree in sources().values() for node in ast.walk(tree) if is_call_of_re(node))
    built = sum(
        1
        for name in sources()
        for function, _ in calls_in_functions(name)
        if (name, function) in BUILT
    )
    examples = sum(map(len, BUILT.values()))
    assert len(ALL) == calls - built + examples
    assert len(ALL) > 50


@pytest.mark.parametrize(
    ("pattern", "method"),
    [
        (r"(a+)+b", "match"),
        (r"(?:a|a)*b", "fullmatch"),
        (r"\s*,\s*$", "search"),
        (r"<\s*([^<>\s]+@[^<>\s]+)\s*>\Z", "search"),
        (r"([a-z]+)*@x", "fullmatch"),
        (r"[a-z]+[0-9a-z]+!", "fullmatch"),
        (rb"(?im)^x:\s*(\S[^\r\n]*?)\s*$", "search"),
        (r"//[^/]*:.*@", "sub"),
        (r'"[^x]*x', "findall"),
    ],
)
def test_a_slow_expression_is_noticed(pattern: str | bytes, method: str) -> None:
    with pytest.raises(SlowPatternError):
        check_linear(re.compile(pattern), [method])


@pytest.mark.parametrize(
    ("pattern", "method"),
    [(r"[^x]*x?", "fullmatch"), (r"\s+", "sub"), (r"a{1,60}b", "search"), (r"(?m)^\.", "sub")],
)
def test_a_linear_expression_passes(pattern: str, method: str) -> None:
    check_linear(re.compile(pattern), [method])
