"""The reason that is named for a job's wait, and its text."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Final

import pytest

from outbox_server.services.scheduler.explaining import (
    WHY_NOT_COUNTED,
    LastAttempt,
    OpenCircuit,
    Situation,
    WaitReason,
    explain,
)
from outbox_server.shared.cooldowns.record import CooldownRecord
from outbox_server.shared.states import NOT_COUNTED, AttemptOutcome, ReplyClass

NOW: Final = datetime(2026, 11, 28, 10, 5, tzinfo=UTC)
MINUTE: Final = timedelta(minutes=1)
FREE: Final = Situation(
    now=NOW,
    due=NOW - MINUTE,
    attempts=0,
    failures=0,
    sender_active=True,
    ahead=0,
    in_flight=0,
    gap_left=timedelta(0),
    window_left=timedelta(0),
    hourly_limit=200,
)


def cooldown(probe: datetime) -> CooldownRecord:
    since = NOW - 3 * MINUTE
    text = "Daily user sending limit exceeded"
    return CooldownRecord(since, probe, 1, text, 550, "5.4.5")


def circuit(probe: datetime) -> OpenCircuit:
    return OpenCircuit(NOW - MINUTE, probe, "connection refused")


def test_a_cooldown_names_the_reply_and_the_next_probe() -> None:
    found = explain(replace(FREE, cooldown=cooldown(NOW + 2 * MINUTE), ahead=7))
    assert (found.reason, found.until) == (WaitReason.COOLDOWN, NOW + 2 * MINUTE)
    assert found.text == (
        "The mail server has refused the sender's account since 2026-11-28 10:02:00 UTC (550 5.4.5 "
        "Daily user sending limit exceeded); the next probe is at 2026-11-28 10:07:00 UTC."
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sender_active": False}, WaitReason.SENDER_PAUSED),
        ({"due": NOW + MINUTE}, WaitReason.NOT_DUE),
        ({"due": NOW + MINUTE, "attempts": 1}, WaitReason.RETRY),
        ({}, WaitReason.COOLDOWN),
        ({"window_left": 90 * MINUTE, "gap_left": MINUTE, "ahead": 3}, WaitReason.COOLDOWN),
    ],
)
def test_a_cooldown_comes_after_pause_and_due_time_and_before_the_limits(
    change: dict[str, object], reason: WaitReason
) -> None:
    it = replace(FREE, cooldown=cooldown(NOW + 2 * MINUTE))
    assert explain(replace(it, **change)).reason is reason  # type: ignore[arg-type]  # by name


@pytest.mark.parametrize(
    ("probe", "down_until", "opens", "reason"),
    [
        (3, 2, 1, WaitReason.COOLDOWN),
        (1, 3, 2, WaitReason.ENDPOINT_DOWN),
        (1, 2, 3, WaitReason.SENDING_HOURS),
        (2, 2, 2, WaitReason.COOLDOWN),
    ],
)
def test_the_reason_that_ends_last_is_named(
    probe: int, down_until: int, opens: int, reason: WaitReason
) -> None:
    found = explain(
        replace(
            FREE,
            cooldown=cooldown(NOW + probe * MINUTE),
            circuit=circuit(NOW + down_until * MINUTE),
            opens=NOW + opens * MINUTE,
        )
    )
    last = max(probe, down_until, opens)
    assert (found.reason, found.until) == (reason, NOW + last * MINUTE)


@pytest.mark.parametrize("change", [{"ahead": 1}, {"in_flight": 1}])
def test_jobs_behind_a_probe_have_no_known_end_of_their_wait(change: dict[str, int]) -> None:
    found = explain(replace(FREE, cooldown=cooldown(NOW), **change))  # type: ignore[arg-type]  # by name
    assert (found.reason, found.until) == (WaitReason.COOLDOWN, None)
    assert "another mail goes first as a probe" in found.text


def test_a_probe_waits_for_the_same_limits_as_any_mail() -> None:
    probe = replace(FREE, cooldown=cooldown(NOW))
    assert explain(probe).reason is WaitReason.DISPATCHER
    assert explain(replace(probe, gap_left=MINUTE)).reason is WaitReason.MIN_GAP


def test_a_deferred_job_shows_the_reply_the_next_attempt_and_the_end() -> None:
    outcome = AttemptOutcome.TEMPORARY_FAILURE
    deferred = LastAttempt(outcome, "4.7.1 Greylisted", 450, "4.7.1", ReplyClass.DEFERRED)
    it = replace(
        FREE,
        attempts=2,
        due=NOW + 10 * MINUTE,
        last=deferred,
        deferred_until=NOW + timedelta(days=1),
    )
    found = explain(it)
    assert (found.reason, found.until) == (WaitReason.DEFERRED, NOW + 10 * MINUTE)
    assert found.text == (
        "The mail server asked for this mail later (450 4.7.1 Greylisted); attempt 3 is at "
        "2026-11-28 10:15:00 UTC, and it is tried until 2026-11-29 10:05:00 UTC."
    )
    # It waits because of the last failure, although it was deferred before.
    in_doubt = LastAttempt(AttemptOutcome.IN_DOUBT, "connection reset")
    failed = explain(replace(it, failures=1, last=in_doubt))
    assert failed.reason is WaitReason.RETRY
    assert failed.text == "Attempt 2 failed; attempt 3 is at 2026-11-28 10:15:00 UTC."


@pytest.mark.parametrize("reply_class", sorted(NOT_COUNTED))
def test_a_refusal_that_uses_no_attempt_is_not_called_a_failure(reply_class: ReplyClass) -> None:
    outcome = AttemptOutcome.TEMPORARY_FAILURE
    last = LastAttempt(outcome, "too many", 432, "4.3.2", reply_class)
    found = explain(replace(FREE, attempts=1, due=NOW + MINUTE, last=last))
    assert found.reason is WaitReason.RETRY
    assert "Attempt 1 failed" not in found.text
    assert found.text.startswith("Attempt 1 does not count as a failure, since ")
    assert "(432 4.3.2 too many); attempt 2 is at" in found.text


def test_every_class_that_uses_no_attempt_has_a_text() -> None:
    assert set(WHY_NOT_COUNTED) == NOT_COUNTED


@pytest.mark.parametrize("failures", [0, 2])
def test_a_session_that_the_server_refused_is_not_called_a_failure(failures: int) -> None:
    refused = LastAttempt(
        AttemptOutcome.CONNECTION_FAILURE, "shutting down", 421, "4.3.2", ReplyClass.TEMPORARY
    )
    found = explain(replace(FREE, attempts=3, failures=failures, due=NOW + MINUTE, last=refused))
    assert found.reason is WaitReason.RETRY
    assert found.text == (
        "Attempt 3 does not count as a failure, since the mail server refused the session (421 "
        "4.3.2 shutting down); attempt 4 is at 2026-11-28 10:06:00 UTC."
    )


def test_a_server_that_was_never_reached_is_not_called_a_failure() -> None:
    unreached = LastAttempt(AttemptOutcome.CONNECTION_FAILURE, "connection refused")
    found = explain(replace(FREE, attempts=2, due=NOW + MINUTE, last=unreached))
    assert found.reason is WaitReason.RETRY
    assert found.text == (
        "Attempt 2 does not count as a failure, since no session with the mail server could be "
        "opened (connection refused); attempt 3 is at 2026-11-28 10:06:00 UTC."
    )


def test_the_explanation_of_a_failed_connection_counts_earlier_failures() -> None:
    broken = LastAttempt(AttemptOutcome.CONNECTION_FAILURE, "connection reset")
    found = explain(replace(FREE, attempts=4, failures=2, due=NOW + MINUTE, last=broken))
    assert found.text == (
        "The connection of attempt 4 failed (connection reset); attempts that count as failures so "
        "far: 2; attempt 5 is at 2026-11-28 10:06:00 UTC."
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"claimed_for": timedelta(seconds=2), "in_flight": 1}, WaitReason.SHARE),
        # Its own claim has used up the window.
        ({"claimed_for": MINUTE, "in_flight": 1, "window_left": MINUTE}, WaitReason.SHARE),
        ({"claimed_for": timedelta(0), "in_flight": 1}, WaitReason.QUEUE),
        ({"parked": True}, WaitReason.SHARE),
        ({"parked": True, "gap_left": MINUTE}, WaitReason.MIN_GAP),
        ({"parked": True, "ahead": 1}, WaitReason.QUEUE),
        ({"parked": True, "circuit": circuit(NOW + MINUTE)}, WaitReason.ENDPOINT_DOWN),
    ],
)
def test_a_job_that_waits_for_a_slot_of_its_user_names_the_share(
    change: dict[str, object], reason: WaitReason
) -> None:
    assert explain(replace(FREE, **change)).reason is reason  # type: ignore[arg-type]  # by name
