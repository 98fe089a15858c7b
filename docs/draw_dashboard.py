r"""Draws the dashboard without Grafana: its panels and queries, on the answers of a Prometheus.

The picture is not a screenshot of Grafana, which no package registry has. Titles, layout, queries
and legends are those of deploy/grafana/outbox.json; uPlot, which Grafana uses too, draws the lines;
Chromium renders the page.

    npm pack uplot && tar xzf uplot-*.tgz
    python docs/draw_dashboard.py --prometheus http://127.0.0.1:9090 --uplot package/dist \
        --minutes 15 docs/dashboard.png
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, Final

_DASHBOARD: Final = Path(__file__).parents[1] / "deploy" / "grafana" / "outbox.json"
_WIDTH: Final = 1400
_UNIT_PX: Final = 24
_POINTS: Final = 200
_PAGE: Final = """<!doctype html><meta charset="utf-8"><title>Outbox</title>
<style>@style@
body {margin: 0; width: @width@px; background: #f4f5f5; font: 12px sans-serif; color: #222}
.panel {position: absolute; background: #fff; border: 1px solid #ddd; box-sizing: border-box;
        padding: 4px 6px; overflow: hidden}
.panel b {font-weight: 600; display: block} .row {position: absolute; font: 600 14px sans-serif}
.stat {font: 600 34px sans-serif; text-align: center; margin-top: 36px}
.stat small {font: 12px sans-serif; display: block}
.legend {font-size: 10px; line-height: 13px; max-height: 65px; overflow: hidden}
.legend span {white-space: nowrap}
.legend i {display: inline-block; width: 10px; height: 3px; margin: 0 3px 3px 8px}
</style><body><script>@uplot@</script><script>
const colours = ["#3b7dd8", "#e0762f", "#3f9b46", "#c23b3b", "#8b5bc4", "#8a6d3b", "#d65fa8",
                 "#5f6b6d", "#a8a417", "#1fa6b8"];
function text(value, unit) {
  if (value === null) return "no data";
  if (unit === "percentunit") return (100 * value).toFixed(2) + " %";
  if (unit === "bytes") return (value / 1048576).toFixed(0) + " MiB";
  const rounded = +value.toPrecision(3);
  if (unit === "s") return rounded + " s";
  return unit === "cps" || unit === "reqps" ? rounded + "/s" : rounded;
}
function clock(seconds) { return new Date(1000 * seconds).toISOString().slice(11, 16); }
for (const panel of @panels@) {
  const box = document.createElement("div");
  Object.assign(box.style, {left: panel.x + "px", top: panel.y + "px", width: panel.w + "px",
                            height: panel.h + "px"});
  document.body.append(box);
  if (panel.kind === "row") { box.className = "row"; box.textContent = panel.title; continue; }
  box.className = "panel";
  box.append(Object.assign(document.createElement("b"), {textContent: panel.title}));
  if (panel.kind === "stat") {
    for (const line of panel.lines) {
      const known = line.values.filter(value => value !== null);
      const stat = Object.assign(document.createElement("span"), {className: "stat"});
      stat.style.cssText = `display: inline-block; width: ${100 / panel.lines.length}%`;
      stat.textContent = text(known.length ? known.at(-1) : null, panel.unit);
      stat.append(Object.assign(document.createElement("small"), {textContent: line.name}));
      box.append(stat);
    }
    continue;
  }
  const plot = document.createElement("div");
  const legend = Object.assign(document.createElement("div"), {className: "legend"});
  panel.lines.forEach((line, at) => {
    const mark = document.createElement("i");
    mark.style.background = colours[at % colours.length];
    const entry = document.createElement("span");
    entry.append(mark, line.name);
    legend.append(entry, " ");
  });
  box.append(plot, legend);
  let data = panel.lines.map(line => line.values);
  if (panel.stacked) {
    let sums = panel.times.map(() => 0);
    data = data.map(values => sums = sums.map((sum, at) => sum + (values[at] ?? 0)));
  }
  const series = panel.lines.map((_, at) => ({stroke: colours[at % colours.length], width: 1,
    points: {show: false}, fill: panel.stacked ? colours[at % colours.length] + "30" : undefined}));
  const order = series.map((_, at) => panel.stacked ? series.length - 1 - at : at);
  new uPlot({width: panel.w - 14, height: panel.h - 32 - legend.offsetHeight, legend: {show: false},
    cursor: {show: false}, series: [{}, ...order.map(at => series[at])],
    scales: {y: {range: (_, low, high) => [0, high > 0 ? 1.05 * high : 1]}},
    axes: [{size: 28, space: 40, values: (_, ticks) => ticks.map(clock)},
           {size: 58, values: (_, ticks) => ticks.map(tick => text(tick, panel.unit))}]},
    [panel.times, ...order.map(at => data[at])], plot);
}
</script>"""


def _series(prometheus: str, query: str, start: float, end: float) -> tuple[list[float], list[Any]]:
    step = max(5.0, (end - start) / _POINTS)
    asked = urllib.parse.urlencode({"query": query, "start": start, "end": end, "step": step})
    url = f"{prometheus}/api/v1/query_range?{asked}"
    with urllib.request.urlopen(url, timeout=60) as answer:  # noqa: S310 - of our command line
        found = json.load(answer)["data"]["result"]
    times = [start + number * step for number in range(int((end - start) / step) + 1)]
    return times, found


def _lines(
    panel: dict[str, Any], prometheus: str, start: float, end: float, rate: str
) -> tuple[list[float], list[dict[str, Any]]]:
    times: list[float] = []
    lines = []
    for target in panel["targets"]:
        query = target["expr"].replace("$__rate_interval", rate)
        times, found = _series(prometheus, query, start, end)
        for one in found:
            given = {round(at, 3): float(value) for at, value in one["values"]}
            values = [given.get(round(at, 3)) for at in times]
            name = target["legendFormat"]
            for label, value in one["metric"].items():
                name = name.replace(f"{{{{{label}}}}}", value)
            # NaN, such as a share of nothing, is a gap.
            known = [None if value is None or value != value else value for value in values]  # noqa: PLR0124
            lines.append({"name": name, "values": known})
    return times, lines


def _panels(prometheus: str, start: float, end: float, rate: str) -> tuple[list[Any], int]:
    column = _WIDTH / 24
    drawn, bottom = [], 0
    for panel in json.loads(_DASHBOARD.read_text(encoding="utf-8"))["panels"]:
        grid = panel["gridPos"]
        place = {
            "kind": panel["type"],
            "title": panel["title"],
            "x": round(grid["x"] * column) + 2,
            "y": grid["y"] * _UNIT_PX + 2,
            "w": round(grid["w"] * column) - 4,
            "h": grid["h"] * _UNIT_PX - 4,
        }
        bottom = max(bottom, (grid["y"] + grid["h"]) * _UNIT_PX)
        if panel["type"] != "row":
            times, lines = _lines(panel, prometheus, start, end, rate)
            place |= {
                "unit": panel["fieldConfig"]["defaults"]["unit"],
                "stacked": panel["fieldConfig"]["defaults"]["custom"]
                .get("stacking", {})
                .get("mode")
                == "normal",
                "times": times,
                "lines": lines,
            }
        drawn.append(place)
    return drawn, bottom


def main(arguments: list[str]) -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090")
    parser.add_argument("--uplot", type=Path, required=True, help="the folder dist of uPlot")
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--end", type=float, default=time.time(), help="seconds since 1970")
    parser.add_argument("--rate", default="60s", help="the value of $__rate_interval")
    given = parser.parse_args(arguments)
    start = given.end - 60 * given.minutes
    panels, height = _panels(given.prometheus, start, given.end, given.rate)
    parts = {
        "style": (given.uplot / "uPlot.min.css").read_text(encoding="utf-8"),
        "uplot": (given.uplot / "uPlot.iife.min.js").read_text(encoding="utf-8"),
        "width": str(_WIDTH),
        "panels": json.dumps(panels),
    }
    page = re.sub(r"@(style|uplot|width|panels)@", lambda part: parts[part[1]], _PAGE)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        file.write_text(page, encoding="utf-8")
        words = ["chromium", "--headless", "--no-sandbox", "--hide-scrollbars", "--disable-gpu"]
        words += [f"--user-data-dir={folder}/profile", f"--window-size={_WIDTH},{height + 8}"]
        words += [f"--screenshot={given.picture.absolute()}", file.as_uri()]
        subprocess.run(words, check=True, timeout=120)  # noqa: S603 - our own command line


if __name__ == "__main__":
    main(sys.argv[1:])
