"""One test for all cases of a table: pytest's work per test costs more than most of these cases."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable, Sequence
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


def for_each_case(
    names: str, cases: Iterable[Sequence[Any]]
) -> Callable[[Callable[..., Awaitable[None]]], Callable[..., Awaitable[None]]]:
    """Make a test that awaits the function with each case, all of them with the same fixtures.

    Like `pytest.mark.parametrize`, for a server that a case does not change: starting one costs
    more than most cases. `names` are the parameters of a case, with spaces between them.
    """

    def decorate(check: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
        async def test(**fixtures: Any) -> None:
            count = 0
            for case in cases:
                count += 1
                try:
                    await check(**fixtures, **dict(zip(names.split(), case, strict=True)))
                except Exception as error:
                    error.add_note(f"the case: {case!r:.500}")
                    raise
            assert count, "there are no cases"

        whole = inspect.signature(check)
        kept = [one for name, one in whole.parameters.items() if name not in names.split()]
        named: Any = test
        # What pytest reads the fixtures from.
        named.__signature__ = whole.replace(parameters=kept)
        for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
            setattr(named, attribute, getattr(check, attribute))
        return test

    return decorate
