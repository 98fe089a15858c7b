"""Writes what follows from the chart and from the settings (`make manifests`).

- `deploy/manifests/outbox.yaml`: the chart rendered with `manifests.yaml` beside this file, for
  `kubectl apply`.
- `outbox/files`: copies of the alert rules and of the dashboard.
- `values.schema.json`: the names of the settings that the chart's value `settings` takes.
"""

from __future__ import annotations

from pathlib import Path

from outbox_server.deploy.chart.rendering import CHART, COPIED, manifests, schema_with_settings

DEPLOY = Path(__file__).parents[1]

if __name__ == "__main__":
    # First the schema, by which the values are checked when the manifests are rendered.
    schema = CHART / "values.schema.json"
    schema.write_text(schema_with_settings(), encoding="utf-8")
    for source in COPIED:
        (CHART / "files" / source.name).write_bytes(source.read_bytes())
    rendered = DEPLOY / "manifests" / "outbox.yaml"
    rendered.parent.mkdir(exist_ok=True)
    rendered.write_text(manifests(), encoding="utf-8")
