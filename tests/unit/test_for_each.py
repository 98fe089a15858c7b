from __future__ import annotations

import pytest

from tests.for_each import for_each, for_each_case


def test_a_case_that_fails_is_named() -> None:
    @for_each(range(3))
    def check(number: int) -> None:
        assert number < 2

    with pytest.raises(AssertionError) as caught:
        check()
    assert caught.value.__notes__ == ["the case: 2"]


@pytest.fixture
def limit() -> int:
    return 2


async def test_a_case_that_fails_beside_fixtures_is_named(limit: int) -> None:
    seen: list[tuple[int, str]] = []

    @for_each_case("number name", [(1, "one"), (2, "two"), (3, "three")])
    async def check(limit: int, number: int, name: str) -> None:
        seen.append((number, name))
        assert number < limit

    with pytest.raises(AssertionError) as caught:
        await check(limit=limit)
    assert seen == [(1, "one"), (2, "two")]
    assert caught.value.__notes__ == ["the case: (2, 'two')"]


async def test_a_table_without_cases_fails() -> None:
    @for_each_case("number", [])
    async def check(number: int) -> None:
        del number

    with pytest.raises(AssertionError, match="there are no cases"):
        await check()


@for_each_case("name size", [("a", 1), ("ab", 2)])
async def test_the_other_parameters_are_fixtures(limit: int, name: str, size: int) -> None:
    assert len(name) == size <= limit
