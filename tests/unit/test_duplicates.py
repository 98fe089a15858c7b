from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from outbox_server.shared.intake.duplicates import DuplicateFinder

KEYS = st.sampled_from(["a@x.de", "b@x.de", "c@x.de", "straße@x.de", "", "A@x.de"]) | st.text(
    alphabet=st.characters(exclude_categories=["Cs"]), max_size=3
)


@given(st.lists(st.lists(KEYS, max_size=8), max_size=8))
def test_only_the_first_of_equal_keys_is_new(blocks: list[list[str]]) -> None:
    seen: set[str] = set()
    with DuplicateFinder() as finder:
        for block in blocks:
            expected = []
            for key in block:
                expected.append(key not in seen)
                seen.add(key)
            assert finder.new_in_block(block) == expected


def test_keys_beyond_the_cache_are_still_detected() -> None:
    with DuplicateFinder(cache_kib=64) as finder:
        for start in range(0, 20_000, 5_000):
            keys = [
                f"user{number * 7919 % 20_000}@example.com"
                for number in range(start, start + 5_000)
            ]
            assert all(finder.new_in_block(keys))
        assert finder.new_in_block(["user17@example.com", "new@example.com"]) == [False, True]
