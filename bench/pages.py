"""`python -m bench.pages`: writes the figures of a run into docs/: tables, a chart, and their data.

A table stands between `<!-- bench: NAME -->` and `<!-- end of bench -->`. Whoever changes what a
table says changes this module, and runs it again: it reads docs/bench.json, a copy of
build/bench.json.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[1]
PAGE: Final = ROOT / "docs" / "scale.md"
DATA: Final = ROOT / "docs" / "bench.json"
CHART: Final = ROOT / "docs" / "bench.svg"
MEASURED: Final = ROOT / "build" / "bench.json"

Run = Mapping[str, Any]
_TABLE: Final = re.compile(r"(<!-- bench: (\w+) -->\n).*?(<!-- end of bench -->)", re.DOTALL)
_OUTBOX: Final = "Outbox"
_NOTHING: Final = "Not measured with this version yet.\n"
_SECONDS_PER_DAY: Final = 86_400
# Mail is not sent evenly: the busiest hour of a day is assumed to have this many times the average.
PEAK: Final = 3
# A process that is busier than this has mail waiting for it.
BUSY: Final = 0.7
_VOLUMES: Final = (1_000_000, 10_000_000, 100_000_000)


def short(value: float) -> str:
    """Return a figure with three digits, and more where they stand before the point."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value else "0"


def verdict(target: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return the ratio, the target, and whether it is met, as cells of a table."""
    ratio = target["ratio"]
    met = {None: "not measured", True: "yes", False: "no"}[target["met"]]
    return ("" if ratio is None else f"{ratio:.2f}", target["target"], met)


def _median(run: Run, row: str, figure: str, contender: str = _OUTBOX) -> float | None:
    try:
        found = run["rows"][row]["contenders"][contender][figure]["median"]
    except KeyError:
        return None
    return float(found)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def conditions(run: Run) -> str:
    """Return one paragraph: when, where and how much was measured."""
    size, machine = run["size"], run["machine"]
    form = "" if size["is_full"] else " A short form: the targets are about 10,000,000 jobs."
    return (
        f"Measured at {run['at'][:10]} on {machine['cores']} cores that carry everything, other\n"
        f"work of the machine included: {size['jobs']:,} jobs of backlog, {size['mails']:,} "
        f"mails,\nmedians of {run['rounds']} rounds in turns, fsync {run['fsync']}, mail to "
        f"{run['sink']}.{form}\n"
    )


def ratios(run: Run) -> str:
    """Return the table of all targets."""
    rows = []
    for name, row in run["rows"].items():
        for number, target in enumerate(row["targets"]):
            ratio, text, met = verdict(target)
            cells = (f"`{name}`", row["size"]) if number == 0 else ("", "")
            rows.append((*cells, text, ratio, met))
    return _table(("row", "size", "target", "ratio", "met"), rows)


def rivals(run: Run) -> str:
    """Return the table of mails per second and processor time per mail, by contender."""
    rows = []
    for name in ("dispatch_c5", "dispatch_c50", "dispatch_remote"):
        for label, figures in run["rows"].get(name, {"contenders": {}})["contenders"].items():
            rate = figures["mails_per_s"]
            spread = " to ".join(short(value) for value in rate["spread"])
            costs = [
                short(figures[f"{part}_us"]["median"]) if f"{part}_us" in figures else ""
                for part in ("dispatcher", "postgresql", "redis", "sink")
            ]
            rows.append((f"`{name}`", label, short(rate["median"]), spread, *costs))
    head = ("row", "contender", "mails/s", "spread", "dispatcher or worker, us", "PostgreSQL, us")
    return _table((*head, "Redis, us", "sink, us"), rows)


def notes(run: Run) -> str:
    """Return the list of the things that the rivals do not do."""
    found = sorted({note for row in run["rows"].values() for note in row["notes"]})
    return "".join(f"- {note[0].upper()}{note[1:]}.\n" for note in found)


# Step, row, contender, figure, unit, how the figure becomes a cost in that unit.
_STEPS: Final[tuple[tuple[str, str, str, str, Callable[[float], float]], ...]] = (
    ("accept a row of an upload", "intake_upload", "rows_per_s", "us per row", lambda v: 1e6 / v),
    ("accept a call with one row", "intake_small", "calls_per_s_1", "ms", lambda v: 1000 / v),
    ("send a mail: dispatcher", "cpu_per_mail", "dispatcher_us", "us per mail", float),
    ("the same: PostgreSQL", "cpu_per_mail", "postgresql_us", "us per mail", float),
    ("the same: Redis", "cpu_per_mail", "redis_us", "us per mail", float),
    ("with TLS, an account each", "dispatch_accounts", "dispatcher_us", "us per mail", float),
    ("read the counts of a sender (median)", "stats", "p50_ms", "ms", float),
    ("the slowest list of jobs (median)", "lists", "slowest_ms", "ms", float),
    ("cancel a batch, until the answer", "cancel_million", "answer_s", "s", float),
    ("cancel a batch, until the last row", "cancel_million", "all_rows_s", "s", float),
    ("cancel by a filter, until the last answer", "cancel_filter_million", "answer_s", "s", float),
    ("cancel by a filter, until the last row", "cancel_filter_million", "all_rows_s", "s", float),
    ("rebuild an emptied Redis, until the first send", "rebuild", "first_s", "s", float),
    ("the same, until all senders have sent", "rebuild", "all_s", "s", float),
    ("keep the waiting jobs of 1,000 senders in Redis", "redis_bytes", "mb", "MB", float),
    ("store a waiting job in PostgreSQL", "redis_bytes", "job_bytes", "bytes", float),
    ("store an attempt", "redis_bytes", "attempt_bytes", "bytes", float),
    ("wait for limits: dispatcher", "idle", "dispatcher_percent", "% of a core", float),
)


def costs(run: Run) -> str:
    """Return the table of the cost of each step."""
    rows = []
    for step, row, figure, unit, cost in _STEPS:
        found = _median(run, row, figure)
        if found is not None:
            size = run["rows"][row]["size"]
            rows.append((step, f"{short(cost(found))} {unit}", f"`{row}`", size))
    return _table(("step", "cost", "row", "size"), rows)


def processes(run: Run) -> str:
    """Return the table of how many processes a day's mail takes."""
    parts = [
        ("dispatchers", "dispatcher_us"),
        ("cores of PostgreSQL", "postgresql_us"),
        ("cores of Redis", "redis_us"),
    ]
    head = ("mails a day", "average per s", f"busiest hour ({PEAK} x) per s")
    rows = []
    for volume in _VOLUMES:
        average = volume / _SECONDS_PER_DAY
        cells = [f"{volume:,}", short(average), short(average * PEAK)]
        for _, figure in parts:
            cost = _median(run, "cpu_per_mail", figure)
            if cost is None:
                cells.append("not measured")
                continue
            cores = average * PEAK * cost / 1e6
            cells.append(f"{max(1, -(-cores // BUSY)):.0f} ({cores:.2f} busy)")
        rows.append(tuple(cells))
    return _table((*head, *(name for name, _ in parts)), rows)


TABLES: Final[Mapping[str, Callable[[Run], str]]] = {
    each.__name__: each for each in (conditions, ratios, rivals, notes, costs, processes)
}


def page_with(run: Run, page: str) -> str:
    """Return the page with its tables written again.

    Raises:
        KeyError: the page names a table that does not exist.
    """

    def written(name: str) -> str:
        return TABLES[name](run) if run["rows"] else _NOTHING

    return _TABLE.sub(lambda found: f"{found[1]}{written(found[2])}{found[3]}", page)


def chart(run: Run) -> str:
    """Return the rates of all contenders as bars, in SVG: no script, no font from elsewhere."""
    groups = [
        (name, row["contenders"])
        for name, row in run["rows"].items()
        if name in ("dispatch_c5", "dispatch_c50", "dispatch_remote")
    ]
    bars = [
        (name if number == 0 else "", label, figures["mails_per_s"])
        for name, contenders in groups
        for number, (label, figures) in enumerate(contenders.items())
    ]
    most = max((rate["spread"][1] for _, _, rate in bars), default=1.0)
    parts, y = [], 34
    for group, label, rate in bars:
        y += 12 if group else 0
        width, low, high = (
            round(480 * value / most, 1) for value in (rate["median"], *rate["spread"])
        )
        colour = "#2563a8" if label == _OUTBOX else "#b7bcc4"
        parts.append(
            f'<text x="8" y="{y + 13}" font-weight="bold">{group}</text>'
            f'<text x="128" y="{y + 13}">{label}</text>'
            f'<rect x="226" y="{y}" width="{width}" height="18" fill="{colour}"/>'
            f'<path d="M{226 + low} {y + 9}H{226 + high}" stroke="#222"/>'
            f'<text x="{round(234 + max(width, high), 1)}" y="{y + 13}">'
            f"{short(rate['median'])}</text>"
        )
        y += 24
    title = "mails per second, not measured with this version yet"
    if bars:
        title = f"mails per second, median and spread of {run['rounds']} rounds"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="780" height="{y + 12}" '
        'font-family="sans-serif" font-size="13">\n'
        f'<rect width="780" height="{y + 12}" fill="#fff"/>\n'
        f'<text x="8" y="22" font-size="15">{title}</text>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def write(run: Run) -> None:
    """Write the tables, the chart and their data into docs/."""
    DATA.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    CHART.write_text(chart(run), encoding="utf-8")
    PAGE.write_text(page_with(run, PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def main() -> None:
    """Write what build/bench.json says into docs/; with an argument, what that file says."""
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else MEASURED
    write(json.loads(source.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
