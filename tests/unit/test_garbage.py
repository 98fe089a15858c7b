"""Objects that stay are excluded from garbage collections."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from outbox_server.shared import garbage
from outbox_server.shared.garbage import ShortCollections


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[None]]:
    """One entry for each time that objects were excluded."""
    found: list[None] = []
    before = list(gc.callbacks)
    monkeypatch.setattr(gc, "freeze", lambda: found.append(None))
    yield found
    gc.callbacks[:] = before


def test_what_is_left_after_a_long_collection_is_excluded_some_times(
    frozen: list[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(garbage, "_LONG_S", 0.0)
    monkeypatch.setattr(garbage, "_MOST", 3)
    ShortCollections().start()
    assert len(frozen) == 1
    gc.collect(1)
    assert len(frozen) == 1
    for excluded in (2, 3, 4, 4):
        gc.collect()
        assert len(frozen) == excluded


def test_a_short_collection_excludes_nothing(
    frozen: list[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(garbage, "_LONG_S", 60.0)
    ShortCollections().start()
    gc.collect()
    assert len(frozen) == 1
