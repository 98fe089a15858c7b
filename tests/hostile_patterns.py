"""Texts that make a regular expression slow, derived from the expression itself.

A backtracking matcher is slow where a text repeats what two parts of a pattern can both match, and
then does not go on. So the texts are a prefix that leads to a repetition, a pump that is repeated,
and an end that matches nothing.
"""

from __future__ import annotations

import re
import signal
import string
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import permutations
from re import _constants as kinds
from re import _parser as parser
from types import FrameType
from typing import Any, Final

CHARACTERS: Final = string.printable + "\x00\x1b\x7f\u00a0\u00e9\u0301\u0661\u2028"
_CATEGORIES: Final = {
    kinds.CATEGORY_DIGIT: r"\d",
    kinds.CATEGORY_NOT_DIGIT: r"\D",
    kinds.CATEGORY_SPACE: r"\s",
    kinds.CATEGORY_NOT_SPACE: r"\S",
    kinds.CATEGORY_WORD: r"\w",
    kinds.CATEGORY_NOT_WORD: r"\W",
}
_LEAVES: Final = (kinds.LITERAL, kinds.NOT_LITERAL, kinds.ANY, kinds.IN)
_REPEATS: Final = (kinds.MAX_REPEAT, kinds.MIN_REPEAT, kinds.POSSESSIVE_REPEAT)
# A first look at this many characters: linear work takes about 0.05 ms, quadratic work 3 to 30 ms.
_SHORT: Final = 2_000
_FACTOR: Final = 16
_SUSPICIOUS_S: Final = 0.001
# Linear work grows by 16, quadratic work by 256.
_MOST_GROWTH: Final = 64
_TRIES: Final = 2
# CPU time: a busy machine does not use it up. Linear work takes far less, also for the long text.
_LIMIT_S: Final = 0.5

Method = Callable[[Any], object]


class SlowPatternError(AssertionError):
    """A pattern takes more than linear time."""


def check_linear(pattern: re.Pattern[Any], methods: Sequence[str]) -> None:
    """Check that these methods of a pattern take linear time for all texts.

    Raises:
        SlowPatternError: one does not.
    """
    binary = isinstance(pattern.pattern, bytes)
    for prefix, pump, end in shapes(pattern):
        for method in methods:
            call = _method(pattern, method, binary=binary)
            about = f"{method} of {pattern.pattern!r}: {prefix!r} + n x {pump!r} + {end!r}"

            def seconds(
                length: int,
                call: Method = call,
                parts: tuple[str, str, str] = (prefix, pump, end),
            ) -> float:
                text = parts[0] + parts[1] * (length // len(parts[1])) + parts[2]
                given = text.encode("latin-1", "ignore") if binary else text
                began = time.thread_time()
                call(given)
                return time.thread_time() - began

            with _limited(about):
                if seconds(_SHORT) < _SUSPICIOUS_S:
                    continue
                short = min(seconds(_SHORT) for _ in range(_TRIES))
                long = min(seconds(_FACTOR * _SHORT) for _ in range(_TRIES))
            if short >= _SUSPICIOUS_S / 2 and long > _MOST_GROWTH * short:
                raise SlowPatternError(
                    f"{about}: {short:.4f} s, and {long:.4f} s for {_FACTOR} times as much"
                )


@contextmanager
def _limited(about: str) -> Iterator[None]:
    """Interrupt the matcher after a time on the CPU; it may take exponential time."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise SlowPatternError(f"{about}: more than {_LIMIT_S} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, _LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _method(pattern: re.Pattern[Any], name: str, *, binary: bool) -> Method:
    if name in ("sub", "subn"):
        replacement: Any = b"" if binary else ""
        return lambda text: getattr(pattern, name)(replacement, text)
    if name == "finditer":
        return lambda text: list(pattern.finditer(text))
    found: Method = getattr(pattern, name)
    return found


def shapes(pattern: re.Pattern[Any]) -> Iterator[tuple[str, str, str]]:
    """Yield prefix, pump and end of the texts for a pattern."""
    source = pattern.pattern
    if isinstance(source, bytes):
        source = source.decode("latin-1")
    # The flags of a pattern of bytes do not suit a text, and none of them changes its structure.
    tree = parser.parse(source, pattern.flags & (re.VERBOSE | re.DOTALL | re.MULTILINE))
    characters, breaker = _representatives(tree)
    prefixes, bodies = {""}, set(characters)
    _collect(tree, "", characters, prefixes, bodies)
    pairs = ["".join(pair) for pair in permutations(characters, 2)]
    for prefix in sorted(prefixes):
        for pump in sorted(bodies - {""}):
            other = next((one for one in characters if one not in pump), breaker)
            for end in dict.fromkeys(("", breaker, other)):
                yield prefix, pump, end
    for pump in pairs:
        yield "", pump, breaker


def _representatives(tree: Any) -> tuple[list[str], str]:
    """Return one character for each way in which the parts of a pattern match, and one for none."""
    leaves = list(_leaves(tree))
    by_signature: dict[tuple[bool, ...], str] = {}
    for character in CHARACTERS:
        signature = tuple(_matches(leaf, character) for leaf in leaves)
        by_signature.setdefault(signature, character)
    none = tuple(False for _ in leaves)
    # If everything matches something, a line break is the most likely to match little.
    breaker = by_signature.pop(none, "\n")
    return list(by_signature.values())[:12], breaker


def _leaves(tree: Any) -> Iterator[tuple[Any, Any]]:
    for kind, argument in tree:
        if kind in _LEAVES:
            yield kind, argument
        for inner in _children(kind, argument):
            yield from _leaves(inner)


def _children(kind: Any, argument: Any) -> list[Any]:
    """Return the alternatives within a node."""
    if kind in _REPEATS:
        return [argument[2]]
    if kind is kinds.SUBPATTERN:
        return [argument[3]]
    if kind is kinds.BRANCH:
        return list(argument[1])
    if kind in (kinds.ASSERT, kinds.ASSERT_NOT):
        return [argument[1]]
    return [argument] if kind is kinds.ATOMIC_GROUP else []


def _matches(leaf: tuple[Any, Any], character: str) -> bool:
    kind, argument = leaf
    code = ord(character)
    if kind is kinds.ANY:
        return character != "\n"
    if kind is kinds.IN:
        negated = argument[0][0] is kinds.NEGATE
        return any(_in_set(item, code) for item in argument[int(negated) :]) != negated
    return bool(code == argument) == (kind is kinds.LITERAL)


def _in_set(item: tuple[Any, Any], code: int) -> bool:
    kind, argument = item
    if kind is kinds.RANGE:
        return bool(argument[0] <= code <= argument[1])
    if kind is kinds.CATEGORY:
        return re.fullmatch(_CATEGORIES[argument], chr(code)) is not None
    return bool(code == argument)


def _collect(
    tree: Any, before: str, characters: Sequence[str], prefixes: set[str], bodies: set[str]
) -> None:
    """Add a text that leads to each repetition, and the texts that it repeats."""
    for kind, argument in tree:
        if kind in _REPEATS:
            prefixes.add(before)
            bodies.update(_examples(argument[2], characters))
        for inner in _children(kind, argument):
            _collect(inner, before, characters, prefixes, bodies)
        before += _examples([(kind, argument)], characters)[0]


def _examples(tree: Any, characters: Sequence[str]) -> list[str]:
    """Return texts that a part matches, one for each alternative at its top."""
    texts = [""]
    for kind, argument in tree:
        if kind in _LEAVES:
            fitting = [one for one in characters if _matches((kind, argument), one)]
            texts = [text + (fitting or [""])[0] for text in texts]
        elif kind is kinds.BRANCH:
            texts = [
                text + one
                for text in texts
                for branch in argument[1]
                for one in _examples(branch, characters)[:1]
            ]
        elif kind in _REPEATS:
            once = _examples(argument[2], characters)[0]
            texts = [text + once * max(1, argument[0]) for text in texts]
        elif kind is kinds.SUBPATTERN:
            texts = [text + one for text in texts for one in _examples(argument[3], characters)]
        texts = texts[:8]
    return texts
