"""Checkov's policies for Kubernetes and Docker: all hold except those listed with a reason."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from outbox_server.deploy.chart.rendering import CHART, render

ROOT: Final = Path(__file__).parents[2]
# Installed by `make test-deploy`. Checkov has more dependencies than Outbox.
CHECKOV: Final = ROOT / "build" / "checkov" / "bin" / "checkov"
EXCEPTIONS: Final = {
    "CKV_DOCKER_2": "no HEALTHCHECK: the image also runs short commands; each platform has probes",
    "CKV_DOCKER_7": "the base image is an argument, whose default has a tag",
    "CKV_K8S_11": "no CPU limits: throttling would delay mail although the node has time to spare",
    "CKV_K8S_15": "a release's tag never moves, so a node need not ask the registry at each start",
    "CKV_K8S_21": "the namespace is chosen at the installation, not in the manifest",
    "CKV_K8S_35": "secrets are files, unless the operator asks for variables (secrets.delivery)",
    "CKV_K8S_43": "the digest of an image is the operator's (image.digest)",
}


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The failed policies and the resources that broke them, for all values and the Dockerfile."""
    folder = tmp_path_factory.mktemp("rendered")
    files = [ROOT / "deploy" / "image" / "Dockerfile"]
    for path in sorted((CHART / "ci").glob("*.yaml")):
        resources = render(yaml.safe_load(path.read_text()))
        files.append(folder / path.name)
        files[-1].write_text(yaml.safe_dump_all(resources))
    words = ["--framework", "kubernetes", "dockerfile", "--skip-download", "--quiet", "-o", "json"]
    for file in files:
        words += ["-f", str(file)]
    done = subprocess.run(
        [CHECKOV, *words], capture_output=True, text=True, check=False, timeout=300
    )
    reports: list[dict[str, Any]] = json.loads(done.stdout)
    assert {one["check_type"] for one in reports} == {"kubernetes", "dockerfile"}
    assert all(one["summary"]["parsing_errors"] == 0 for one in reports)
    assert sum(one["summary"]["passed"] for one in reports) > 1000
    found: dict[str, list[str]] = {}
    for one in reports:
        for check in one["results"]["failed_checks"]:
            found.setdefault(check["check_id"], []).append(
                f"{check['file_path']} {check['resource']}"
            )
    return found


def test_no_policy_is_broken_without_a_reason(failed: dict[str, list[str]]) -> None:
    assert {name: where for name, where in failed.items() if name not in EXCEPTIONS} == {}


def test_every_exception_is_still_needed(failed: dict[str, list[str]]) -> None:
    assert EXCEPTIONS.keys() - failed.keys() == set()
