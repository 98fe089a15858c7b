from __future__ import annotations

import json
import re

from bench import pages
from bench.__main__ import ROWS


def test_the_page_and_the_chart_say_what_the_recorded_run_measured() -> None:
    run = json.loads(pages.DATA.read_text())
    assert pages.page_with(run, pages.PAGE.read_text()) == pages.PAGE.read_text(), (
        "run python -m bench.pages docs/bench.json"
    )
    assert pages.chart(run) == pages.CHART.read_text()


def test_the_recorded_run_has_rows_that_exist_and_all_of_their_rounds() -> None:
    run = json.loads(pages.DATA.read_text())
    for name, row in run["rows"].items():
        assert name in ROWS
        assert row["error"] == "", name
        assert run["rounds"] >= 3
        for figures in row["contenders"].values():
            assert {len(found["rounds"]) for found in figures.values()} == {run["rounds"]}, name


def test_each_table_stands_on_the_page() -> None:
    assert set(re.findall(r"<!-- bench: (\w+) -->", pages.PAGE.read_text())) == set(pages.TABLES)
