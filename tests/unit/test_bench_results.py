from __future__ import annotations

import pytest

from bench.guard import MARGIN, exceeded, outdated
from bench.results import OUTBOX, RatioTarget, RowResult


def row_of(target: RatioTarget, **rounds: list[float]) -> dict[str, object]:
    result = RowResult("row", "what", (target,), (), "size")
    for label, values in rounds.items():
        for value in values:
            result.add(label, {"mails_per_s": value})
    return result.as_json()


def test_a_ratio_is_that_of_the_medians() -> None:
    target = RatioTarget((OUTBOX, "mails_per_s"), (("BullMQ", "mails_per_s"),), least=3.0)
    row = row_of(target, Outbox=[290.0, 310.0, 9.0], BullMQ=[100.0, 101.0, 5_000.0])
    assert row["ratio"] == pytest.approx(290 / 101)
    assert row["met"] is False
    assert row["contenders"]["Outbox"]["mails_per_s"] == {  # type: ignore[index]
        "rounds": [290.0, 310.0, 9.0],
        "median": 290.0,
        "spread": [9.0, 310.0],
    }


def test_the_best_of_several_rivals_is_compared_with() -> None:
    target = RatioTarget(
        (OUTBOX, "mails_per_s"), (("a", "mails_per_s"), ("b", "mails_per_s")), least=2.0
    )
    assert row_of(target, Outbox=[200.0], a=[50.0], b=[100.0])["ratio"] == 2.0


def test_a_number_can_be_the_target() -> None:
    target = RatioTarget((OUTBOX, "mails_per_s"), 10.0, most=1.0)
    assert row_of(target, Outbox=[9.0])["met"] is True
    assert row_of(target, Outbox=[11.0])["met"] is False


def test_a_row_that_was_not_measured_has_not_met_its_target() -> None:
    target = RatioTarget((OUTBOX, "mails_per_s"), (("BullMQ", "mails_per_s"),), least=3.0)
    row = row_of(target, Outbox=[9.0])
    assert row["ratio"] is None
    assert row["met"] is False


def test_the_guard_notices_the_loss_of_a_third_of_the_speed() -> None:
    recorded = {"dispatcher": 10.0, "upload": 3.0}
    slower = {"dispatcher": 15.0, "upload": 3.0}
    assert exceeded([slower, slower], recorded) == {"dispatcher": 15.0}


def test_the_guard_forgives_a_try_that_other_work_has_disturbed() -> None:
    recorded = {"dispatcher": 10.0}
    assert exceeded([{"dispatcher": 40.0}, {"dispatcher": 10.0 * MARGIN}], recorded) == {}


def test_the_guard_says_that_a_loss_could_hide_behind_its_record() -> None:
    recorded = {"dispatcher": 10.0, "upload": 3.0}
    assert outdated([{"dispatcher": 6.0, "upload": 3.0}], recorded) == ["dispatcher"]
