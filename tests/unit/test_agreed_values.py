"""Which settings are stored, and what a contradicting environment is told."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path

import pytest

from outbox_server.shared.agreed.values import KEYED, NAMES, AgreedValues
from outbox_server.shared.errors import ConfigurationError
from outbox_server.shared.settings import Settings, load_settings

PAGE = Path(__file__).parents[2] / "docs" / "operating.md"


def test_the_page_says_of_every_setting_whether_it_is_stored_and_why() -> None:
    section = PAGE.read_text("utf-8").partition("## Settings that all processes share")[2]
    rows = re.findall(r"(?m)^\| (`OUTBOX_[^|]*) \| (yes|no) \| ([^|]{20,}) \|$", section)
    decided = {
        name: stored for names, stored, _ in rows for name in re.findall(r"`OUTBOX_(\w+)`", names)
    }
    assert decided.keys() == {name.upper() for name in Settings.model_fields}
    assert {name for name, stored in decided.items() if stored == "yes"} == {
        name.upper() for name in NAMES
    }
    assert set(KEYED) < set(NAMES)


def test_only_a_variable_that_is_set_can_contradict() -> None:
    stored = AgreedValues.from_settings(load_settings(shards=4, rate_window="20s"))
    stored.refuse_other(load_settings())
    stored.refuse_other(load_settings(shards=4, rate_window="20000ms"))
    with pytest.raises(ConfigurationError) as caught:
        stored.refuse_other(load_settings(shards=1, rate_window="5s"))
    assert str(caught.value) == (
        "OUTBOX_SHARDS is 1 here, and 4 for the whole installation; OUTBOX_RATE_WINDOW is 5s here, "
        "and 20s for the whole installation: remove the variable, or change the value of all "
        "processes by `outbox settings set`"
    )


def test_parts_of_a_millisecond_which_are_not_stored_contradict_nothing() -> None:
    given = load_settings(min_gap="1.5ms")
    stored = AgreedValues.from_settings(given)
    assert stored.min_gap == timedelta(milliseconds=1)
    stored.refuse_other(given)
