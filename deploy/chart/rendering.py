"""Renders the chart with Helm's engine, without a cluster."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import helm_python as helm
import yaml

from outbox_server.shared.secret_files import SECRET_SETTINGS
from outbox_server.shared.settings import Settings

CHART: Final = Path(__file__).parent / "outbox"
# Helm reads no file outside a chart, so the chart has copies of these.
COPIED: Final = tuple(
    CHART.parents[1] / path for path in ("prometheus/outbox.rules.yml", "grafana/outbox.json")
)
# Settings that the chart sets itself, from values of its own.
_SET_BY_THE_CHART: Final = frozenset(
    (
        *SECRET_SETTINGS,
        *(name for name in Settings.model_fields if name.endswith("_listen")),
        "plaintext",
        "reply_rules",
        "shutdown_grace",
        "tls_certificate",
        "tls_client_ca",
        "tls_key",
    )
)
# Has only one value that a server accepts in a pod.
_FIXED: Final = frozenset(("auth",))
_HEADER: Final = """\
# Written from the chart by `make manifests`; change deploy/chart/outbox, not this file.
# docs/kubernetes.md says which Secrets have to exist, and in which order to apply the parts.
"""


def render(values: Mapping[str, Any], *, name: str = "outbox") -> list[dict[str, Any]]:
    """Return the resources of the chart in the order of Helm's files, without the notes.

    Raises:
        helm_python.HelmError: the values are refused by the schema or by a template.
    """
    return [
        resource
        for text in _rendered(values, name)
        for resource in yaml.safe_load_all(text)
        if resource
    ]


def manifests() -> str:
    """Return the plain manifests: the chart's resources, without the traces of Helm."""
    values = yaml.safe_load((CHART.parent / "manifests.yaml").read_text(encoding="utf-8"))
    documents = []
    for resource in render(values):
        if resource["metadata"].get("annotations", {}).get("helm.sh/hook") == "test":
            continue
        _strip(resource)
        documents.append(yaml.safe_dump(resource, sort_keys=False, width=100))
    return _HEADER + "---\n" + "---\n".join(documents)


def schema_with_settings() -> str:
    """Return values.schema.json with the settings of today as the names that `settings` takes."""
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    names = Settings.model_fields.keys() - _SET_BY_THE_CHART - _FIXED
    schema["properties"]["settings"]["propertyNames"]["enum"] = sorted(
        f"OUTBOX_{name.upper()}" for name in names
    )
    return json.dumps(schema, indent=2) + "\n"


def _rendered(values: Mapping[str, Any], name: str) -> list[str]:
    with helm.Chart.load(CHART) as chart:
        files = chart.render(dict(values), name=name, namespace="default")
    return [text for path, text in sorted(files.items()) if not path.endswith("NOTES.txt")]


def _strip(resource: dict[str, Any]) -> None:
    """Remove the labels and annotations by which Helm knows its resources."""
    metadata = [resource["metadata"]]
    template = resource.get("spec", {}).get("template")
    if template:
        metadata.append(template["metadata"])
    for one in metadata:
        for kind in ("labels", "annotations"):
            kept = {
                name: value
                for name, value in one.get(kind, {}).items()
                if not name.startswith(("helm.sh/", "checksum/"))
                and name != "app.kubernetes.io/managed-by"
            }
            one.pop(kind, None)
            if kept:
                one[kind] = kept
