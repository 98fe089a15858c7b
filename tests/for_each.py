"""One test for all cases of a table: pytest's work per test costs more than most of these cases."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


def for_each(
    cases: Iterable[T], name: Callable[[T], object] = repr
) -> Callable[[Callable[[T], None]], Callable[[], None]]:
    """Make a test that calls the function with each case. A failure names its case."""

    def decorate(check: Callable[[T], None]) -> Callable[[], None]:
        def test() -> None:
            count = 0
            for case in cases:
                count += 1
                try:
                    check(case)
                except Exception as error:
                    error.add_note(f"the case: {name(case)}")
                    raise
            assert count, "there are no cases"

        # Not functools.wraps: pytest would take the parameter of `check` for a fixture.
        named: Any = test
        for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
            setattr(named, attribute, getattr(check, attribute))
        return test

    return decorate
