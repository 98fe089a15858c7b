"""Ids and labels that callers give to their jobs."""

from __future__ import annotations

import pytest

from outbox_server.shared.intake.tags import (
    BadTag,
    check_external_id,
    check_labels,
    external_key,
    is_label_key,
)


def test_the_key_of_an_id_differs_between_users() -> None:
    keys = {external_key(user, text) for user in ("ann", "bob") for text in ("1", "2", "")}
    assert len(keys) == 6
    assert all(-(2**63) <= key < 2**63 for key in keys)
    # It is stored, so it may never change.
    assert external_key("ann", "C-1") == 4_221_107_712_830_370_289


def test_labels_are_stored_in_the_order_of_their_keys() -> None:
    assert check_labels({"b": 'say "ü"', "a": "1"}) == '{"a":"1","b":"say \\"ü\\""}'
    assert check_labels({}) is None
    assert check_external_id("") is None


@pytest.mark.parametrize("key", ["", "A", "1a", "-a", "a.b", "a b", "ä", "a" * 64, "a\n"])
def test_a_key_is_a_lower_case_name(key: str) -> None:
    assert not is_label_key(key)
    with pytest.raises(BadTag) as caught:
        check_labels({key: "x"})
    assert caught.value.reason == "LABELS_INVALID"


@pytest.mark.parametrize("value", ["", "x" * 129, "a\nb", "a\x00", "a\u2028b"])
def test_a_value_is_a_short_line(value: str) -> None:
    with pytest.raises(BadTag):
        check_labels({"a": value})
