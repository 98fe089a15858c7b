"""The room for batches that were prepared ahead is shared among users."""

from __future__ import annotations

from outbox_server.services.dispatcher.prepared import PreparedBatches


def test_a_user_has_all_room_until_another_needs_it() -> None:
    prepared = PreparedBatches(most=100)
    for batch in range(10):
        assert prepared.has_room("mallory")
        assert prepared.add(batch, "mallory", 10, now=0) == []
    assert not prepared.has_room("mallory")
    assert prepared.has_room("ann")
    # The last batches of the user who has the most give way.
    assert prepared.add(20, "ann", 15, now=0) == [9, 8]
    # Who has the most has no room even if another one has left some.
    prepared.use(20)
    assert prepared.has_room("mallory")


def test_a_used_batch_makes_room_and_is_never_forgotten() -> None:
    prepared = PreparedBatches(most=20)
    prepared.add(1, "ann", 10, now=0)
    prepared.add(2, "ann", 10, now=0)
    prepared.use(2)
    prepared.use(2)
    assert prepared.add(3, "ann", 10, now=0) == []
    assert prepared.add(4, "ann", 10, now=0) == [4]


def test_what_nobody_uses_is_forgotten_after_ten_seconds() -> None:
    prepared = PreparedBatches()
    prepared.add(1, "ann", 10, now=0)
    prepared.add(2, "bob", 10, now=5)
    assert prepared.expire(9.9) == []
    assert prepared.expire(10) == [1]
    assert prepared.expire(10) == []
    assert prepared.expire(15) == [2]
