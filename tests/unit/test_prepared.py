"""The room for batches that were prepared ahead is shared among users."""

from __future__ import annotations

from outbox_server.services.dispatcher.prepared import PreparedBatches


def test_a_user_has_all_room_until_another_needs_it() -> None:
    forgotten: list[int] = []
    prepared = PreparedBatches(forgotten.append, most=100)
    assert all(prepared.add(batch, "mallory", 10, now=0) for batch in range(10))
    assert not prepared.add(10, "mallory", 1, now=0)
    assert forgotten == []
    # The last batches of the user who has the most give way.
    assert prepared.add(20, "ann", 15, now=0)
    assert forgotten == [9, 8]
    assert all(prepared.add(batch, "ann", 15, now=0) for batch in (21, 22))
    assert forgotten == [9, 8, 7, 6, 5]
    # Not for one who would have the most then.
    assert not prepared.add(23, "ann", 15, now=0)
    assert not prepared.add(30, "eve", 101, now=0)
    assert prepared.add(40, "eve", 10, now=0)


def test_a_used_batch_makes_room_and_is_never_forgotten() -> None:
    forgotten: list[int] = []
    prepared = PreparedBatches(forgotten.append, most=20)
    prepared.add(1, "ann", 10, now=0)
    prepared.add(2, "ann", 10, now=0)
    prepared.use(2)
    prepared.use(2)
    assert 2 not in prepared
    assert prepared.add(3, "ann", 5, now=0)
    assert prepared.add(3, "ann", 10, now=0)
    assert not prepared.add(4, "ann", 1, now=0)
    prepared.expire(100)
    assert forgotten == [1, 3]


def test_what_nobody_uses_is_forgotten_after_ten_seconds() -> None:
    forgotten: list[int] = []
    prepared = PreparedBatches(forgotten.append)
    prepared.add(1, "ann", 10, now=0)
    prepared.add(2, "bob", 10, now=5)
    prepared.expire(9.9)
    assert forgotten == []
    prepared.expire(10)
    assert forgotten == [1]
    prepared.expire(15)
    assert forgotten == [1, 2]
