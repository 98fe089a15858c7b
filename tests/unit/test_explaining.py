"""Which of all that holds a job back is named, and in which words."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Final

import pytest

from services.dispatcher.retry import USES_NO_ATTEMPT
from services.scheduler.explaining import (
    NOT_COUNTED,
    LastReply,
    OpenCircuit,
    Situation,
    WaitReason,
    explain,
)
from shared.cooldowns import CooldownRecord
from shared.states import ReplyClass

NOW: Final = datetime(2026, 11, 28, 10, 5, tzinfo=UTC)
MINUTE: Final = timedelta(minutes=1)
FREE: Final = Situation(
    now=NOW,
    due=NOW - MINUTE,
    attempts=0,
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
def test_of_all_that_holds_the_sender_back_the_last_to_end_is_named(
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
def test_behind_a_probe_no_one_can_say_until_when(change: dict[str, int]) -> None:
    found = explain(replace(FREE, cooldown=cooldown(NOW), **change))  # type: ignore[arg-type]  # by name
    assert (found.reason, found.until) == (WaitReason.COOLDOWN, None)
    assert "another mail goes first as a probe" in found.text


def test_the_probe_itself_waits_for_what_any_mail_waits_for() -> None:
    probe = replace(FREE, cooldown=cooldown(NOW))
    assert explain(probe).reason is WaitReason.DISPATCHER
    assert explain(replace(probe, gap_left=MINUTE)).reason is WaitReason.MIN_GAP


def test_a_deferred_job_says_the_reply_the_next_attempt_and_the_end() -> None:
    it = replace(
        FREE,
        attempts=2,
        due=NOW + 10 * MINUTE,
        last=LastReply(ReplyClass.DEFERRED, "450 4.7.1 Greylisted"),
        deferred_until=NOW + timedelta(days=1),
    )
    found = explain(it)
    assert (found.reason, found.until) == (WaitReason.DEFERRED, NOW + 10 * MINUTE)
    assert found.text == (
        "The mail server asked for this mail later (450 4.7.1 Greylisted); attempt 3 is at "
        "2026-11-28 10:15:00 UTC, and it is tried until 2026-11-29 10:05:00 UTC."
    )
    # What went wrong last is what it waits for, though it was deferred before.
    failed = explain(replace(it, last=LastReply(None, "connection reset")))
    assert failed.reason is WaitReason.RETRY
    assert failed.text == "Attempt 2 failed; attempt 3 is at 2026-11-28 10:15:00 UTC."


@pytest.mark.parametrize("reply_class", NOT_COUNTED)
def test_a_refusal_that_uses_no_attempt_is_not_called_a_failure(reply_class: ReplyClass) -> None:
    it = replace(
        FREE, attempts=1, due=NOW + MINUTE, last=LastReply(reply_class, "432 4.3.2 too many")
    )
    found = explain(it)
    assert found.reason is WaitReason.RETRY
    assert "Attempt 1 failed" not in found.text
    assert found.text.startswith("Attempt 1 does not count as a failure, since ")
    assert "(432 4.3.2 too many); attempt 2 is at" in found.text


def test_every_class_that_uses_no_attempt_has_its_words() -> None:
    assert set(NOT_COUNTED) == USES_NO_ATTEMPT
