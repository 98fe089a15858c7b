"""When an installation is held: what a heartbeat says about the PostgreSQL that has it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

from outbox_server.services.dispatcher.restores import find_restore
from outbox_server.services.dispatcher.storage import ServerIdentity, StoredBeat
from outbox_server.shared.queue.heartbeats import KnownBeat
from outbox_server.shared.states import HoldReason

NOW = datetime(2026, 11, 29, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)
DAY = timedelta(days=1)
HOLD_AFTER = timedelta(minutes=5)
SERVER = ServerIdentity(NOW, system_identifier=7, timeline=1)


def stored(age: timedelta = SECOND, number: int = 100, **changes: object) -> StoredBeat:
    beat = StoredBeat(number, NOW - age, original=True, system_identifier=7, timeline=1)
    return replace(beat, **changes)  # type: ignore[arg-type]


def known(age: timedelta = SECOND, number: int = 100) -> KnownBeat:
    return KnownBeat(number, NOW - age)


def reason(
    beat: StoredBeat | None, memory: KnownBeat | None = None, server: ServerIdentity = SERVER
) -> HoldReason | None:
    found = find_restore(beat, server, memory, HOLD_AFTER)
    return None if found is None else found[0]


def test_a_new_installation_is_not_held() -> None:
    assert reason(None) is None


def test_a_restart_is_not_held_however_long_it_was_off() -> None:
    assert reason(stored()) is None
    assert reason(stored(30 * DAY), known(30 * DAY)) is None
    # Redis was lost meanwhile, or was restored from an older snapshot.
    assert reason(stored(30 * DAY)) is None
    assert reason(stored(30 * DAY), known(31 * DAY, 7)) is None


def test_a_dump_is_held_in_whichever_cluster_it_is_restored() -> None:
    assert reason(stored(original=False), known()) is HoldReason.RESTORED
    assert reason(stored(system_identifier=8), known()) is HoldReason.RESTORED
    # One of an older release, without a heartbeat.
    assert reason(None, known(DAY)) is HoldReason.RESTORED


def test_a_promoted_replica_that_lacks_little_is_not_held() -> None:
    promoted = stored(timeline=2)
    assert reason(promoted) is None
    assert reason(promoted, known(number=101)) is None
    # The lack is measured between heartbeats, so a long outage does not count.
    assert reason(stored(DAY, timeline=2), known(DAY - 3 * SECOND, 102)) is None
    assert reason(stored(DAY, timeline=2), known(DAY)) is None


def test_data_that_lack_much_are_held() -> None:
    yesterday = stored(DAY)
    assert reason(yesterday, known(SECOND, 40_000)) is HoldReason.STEPPED_BACK
    assert reason(stored(HOLD_AFTER + 2 * SECOND), known(SECOND, 250)) is HoldReason.STEPPED_BACK
    assert reason(stored(HOLD_AFTER), known(SECOND, 250)) is None


def test_a_recovery_to_a_point_in_time_is_held_also_without_the_memory_of_redis() -> None:
    recovered = stored(DAY, timeline=2)
    assert reason(recovered) is HoldReason.STEPPED_BACK
    # A Redis that knows only much older heartbeats confirms nothing.
    assert reason(recovered, known(9 * DAY, 3)) is HoldReason.STEPPED_BACK


def test_what_the_role_may_not_read_is_not_compared() -> None:
    unreadable = ServerIdentity(NOW, system_identifier=None, timeline=0)
    assert reason(stored(DAY), server=unreadable) is None
    assert reason(stored(original=False), server=unreadable) is HoldReason.RESTORED


def test_what_was_found_is_said_with_both_times() -> None:
    found = find_restore(stored(DAY), SERVER, known(SECOND, 40_000), HOLD_AFTER)
    assert found is not None
    assert found[1] == (
        "PostgreSQL is as it was at 2026-11-28 12:00:00 UTC, but mail was sent until "
        "2026-11-29 11:59:59 UTC"
    )
