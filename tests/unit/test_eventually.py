from __future__ import annotations

import pytest

from tests.eventually import eventually


async def test_eventually_returns_the_first_true_value() -> None:
    values = iter(["", None, "found"])

    assert await eventually(lambda: next(values)) == "found"


async def test_a_condition_may_be_async() -> None:
    values = iter([False, True])

    async def condition() -> bool:
        return next(values)

    assert await eventually(condition)


async def test_eventually_fails_with_the_condition_and_its_last_value() -> None:
    def full() -> list[int]:
        return []

    with pytest.raises(AssertionError, match=r"full was still \[\] after 0\.02 s"):
        await eventually(full, 0.02)
