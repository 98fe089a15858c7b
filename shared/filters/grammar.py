"""Parses a filter (AIP-160) into a tree of comparisons, in time proportional to its length.

    filter     = term {"AND" term} | term {"OR" term}
    term       = ["NOT" | "-"] ("(" filter ")" | comparison)
    comparison = field operator value

AIP-160 lets OR bind tighter than AND, which most people read the other way. A filter may cancel
mail, so AND and OR may be mixed only with parentheses.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Generic, TypeAlias, TypeVar, Union

from outbox_server.shared.bounds import FILTER, MAX_FILTER_DEPTH, MAX_FILTER_TERMS
from outbox_server.shared.errors import InvalidInput
from outbox_server.shared.quoting import quoted

L = TypeVar("L")

_SPACE: Final = re.compile(r"\s*")
_FIELD: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OPERATOR: Final = re.compile(r"<=|>=|!=|<|>|=|:")
_WORD: Final = re.compile(r"[^\s()\"'<>=!:]+")
# A value, after an operator. A time has colons, and an address may have an equals sign.
_VALUE: Final = re.compile(r"[^\s()\"']+")
_QUOTED: Final = {
    quote: re.compile(rf"{quote}((?:[^{quote}\\]|\\.)*){quote}", re.DOTALL) for quote in "\"'"
}
_ESCAPED: Final = re.compile(r"\\(.)", re.DOTALL)
_LINES: Final = str.maketrans("\n\r\t", "   ")
_KEYWORDS: Final = ("AND", "OR", "NOT")
_MAX_SHOWN: Final = 40


@dataclass(frozen=True, slots=True)
class Comparison:
    """A field, an operator and a value, as they were written."""

    field: str
    operator: str
    value: str
    # The places of the field and of the value in the filter, in characters from 1.
    field_at: int
    value_at: int


@dataclass(frozen=True, slots=True)
class AllOf(Generic[L]):
    """Matches if all terms match."""

    terms: tuple[Tree[L], ...]


@dataclass(frozen=True, slots=True)
class AnyOf(Generic[L]):
    """Matches if one of the terms matches."""

    terms: tuple[Tree[L], ...]


@dataclass(frozen=True, slots=True)
class Negation(Generic[L]):
    """Matches if the term does not match."""

    term: Tree[L]


# Quoted, because AllOf is generic in what is being defined.
Tree: TypeAlias = Union[L, "AllOf[L]", "AnyOf[L]", "Negation[L]"]


def wrong_filter(at: int, problem: str) -> InvalidInput:
    """Return the error for a place in the filter, in characters from 1."""
    return InvalidInput.field(
        "filter",
        f"at character {at}: {problem}",
        reason="FILTER_INVALID",
        metadata={"position": str(at)},
    )


def parse_filter(text: str) -> Tree[Comparison] | None:
    """Return the tree of a filter; None if it is empty or white space.

    Raises:
        InvalidInput: FILTER_INVALID, with the position of the error.
    """
    # A filter may have several lines. Nothing that is stored has any other control character.
    FILTER.check("filter", text.translate(_LINES))
    return None if not text.strip() else _Parser(text).parse()


def leaves(tree: Tree[L]) -> Iterator[L]:
    """Yield the comparisons of a tree."""
    match tree:
        case AllOf(terms) | AnyOf(terms):
            for term in terms:
                yield from leaves(term)
        case Negation(term):
            yield from leaves(term)
        case _:
            yield tree


def shown(text: str) -> str:
    """Return a text for an error message, in quotes and cut."""
    return quoted(text, _MAX_SHOWN)


class _Parser:
    """A recursive descent over the text. Every character is read once or twice."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0
        self._terms = 0

    def parse(self) -> Tree[Comparison]:
        found = self._expression()
        if self._at < len(self._text):
            # Only `)` ends an expression early.
            raise self._wrong("there is no open parenthesis for this `)`")
        return found

    def _expression(self) -> Tree[Comparison]:
        terms = [self._term()]
        joined = ""
        while self._skip_space() < len(self._text) and self._text[self._at] != ")":
            keyword = self._keyword()
            if keyword not in ("AND", "OR"):
                raise self._wrong(f"expected AND, OR or the end, got {shown(self._next())}")
            if joined and keyword != joined:
                raise self._wrong("AND and OR are mixed here: add parentheses")
            joined = keyword
            self._at += len(keyword)
            terms.append(self._term())
        if len(terms) == 1:
            return terms[0]
        return AllOf(tuple(terms)) if joined == "AND" else AnyOf(tuple(terms))

    def _term(self) -> Tree[Comparison]:
        self._skip_space()
        if self._keyword() == "NOT":
            return self._nested("NOT", len("NOT"))
        if self._text.startswith("-", self._at):
            return self._nested("-", 1)
        if self._text.startswith("(", self._at):
            return self._nested("(", 1)
        return self._comparison()

    def _nested(self, opening: str, length: int) -> Tree[Comparison]:
        if self._depth == MAX_FILTER_DEPTH:
            raise self._wrong(f"parentheses and NOT may be nested {MAX_FILTER_DEPTH} deep")
        opened = self._at
        self._depth += 1
        self._at += length
        if opening == "(":
            found = self._expression()
            if self._at == len(self._text):
                self._at = opened
                raise self._wrong("this parenthesis is not closed")
            self._at += 1
        else:
            found = Negation(self._term())
        self._depth -= 1
        return found

    def _comparison(self) -> Comparison:
        field_at = self._at
        name = _FIELD.match(self._text, self._at)
        if name is None:
            raise self._wrong(
                f"expected a comparison, such as state = FAILED, got {shown(self._next())}"
            )
        field = name[0]
        if field in _KEYWORDS:
            raise self._wrong(f"expected a comparison, such as state = FAILED, got {field}")
        self._at = name.end()
        while self._text.startswith(".", self._at):
            part = _WORD.match(self._text, self._at + 1)
            if part is None:
                raise self._wrong("expected a name after the point")
            field += f".{part[0]}"
            self._at = part.end()
        self._skip_space()
        operator = _OPERATOR.match(self._text, self._at)
        if operator is None:
            hint = ""
            if field.upper() in _KEYWORDS:
                hint = f"; write {field.upper()} in capital letters"
            raise self._wrong(
                f"expected an operator (=, !=, <, <=, >, >=) after {shown(field)}{hint}"
            )
        if operator[0] == ":":
            raise self._wrong("the operator `:` is not supported; use =")
        self._at = operator.end()
        self._skip_space()
        value_at = self._at
        value = self._value()
        self._terms += 1
        if self._terms > MAX_FILTER_TERMS:
            self._at = field_at
            raise self._wrong(f"a filter may have at most {MAX_FILTER_TERMS} comparisons")
        return Comparison(field, operator[0], value, field_at + 1, value_at + 1)

    def _value(self) -> str:
        quote = self._text[self._at : self._at + 1]
        if quote in _QUOTED:
            quoted = _QUOTED[quote].match(self._text, self._at)
            if quoted is None:
                raise self._wrong("this quote is not closed")
            self._at = quoted.end()
            return _ESCAPED.sub(r"\1", quoted[1])
        plain = _VALUE.match(self._text, self._at)
        if plain is None:
            raise self._wrong(f"expected a value, got {shown(self._next())}")
        self._at = plain.end()
        return plain[0]

    def _keyword(self) -> str:
        word = _WORD.match(self._text, self._at)
        return word[0] if word and word[0] in _KEYWORDS else ""

    def _next(self) -> str:
        """Return the text at the current position, for an error."""
        word = _WORD.match(self._text, self._at)
        return word[0] if word else self._text[self._at : self._at + 1] or "the end"

    def _skip_space(self) -> int:
        space = _SPACE.match(self._text, self._at)
        self._at = space.end() if space else self._at
        return self._at

    def _wrong(self, problem: str) -> InvalidInput:
        return wrong_filter(self._at + 1, problem)
