"""The bill of materials (CycloneDX) of a server.

cyclonedx-py describes the whole environment; only the production dependencies are kept.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.utils import canonicalize_name

from release.dependencies import production_distributions
from release.licenses import license_of
from release.versions import ROOT


def bill_of_materials(epoch: int = 0) -> str:
    """Return the bill as JSON, with the time `epoch`: the same every time for the same packages.

    Raises:
        RuntimeError: cyclonedx-py failed.
    """
    options = ("--no-validate", "--output-reproducible", "--of", "JSON", "--sv", "1.6")
    tool = Path(sys.executable).with_name("cyclonedx-py")
    done = subprocess.run(
        [tool, "environment", *options, "--pyproject", ROOT / "pyproject.toml", sys.executable],
        env={**os.environ, "SOURCE_DATE_EPOCH": str(epoch)},
        cwd=ROOT,
        capture_output=True,
        check=False,
        text=True,
        timeout=120,
    )
    if done.returncode:
        raise RuntimeError(f"cyclonedx-py failed: {done.stderr}")
    document = _production_only(json.loads(done.stdout))
    return json.dumps(document, indent=2, sort_keys=True) + "\n"


def _production_only(document: dict[str, Any]) -> dict[str, Any]:
    production = production_distributions()
    root = document["metadata"]["component"]
    kept = [
        component
        for component in document["components"]
        if canonicalize_name(component["name"]) in production and component["name"] != root["name"]
    ]
    for component in kept:
        if not component.get("licenses"):  # older metadata, which only `licenses` understands
            known = license_of(production[canonicalize_name(component["name"])])
            component["licenses"] = [{"expression": known}]
        # The path of an editable installation on this machine is not part of the release.
        references = component.get("externalReferences", [])
        component["externalReferences"] = [
            one for one in references if not one["url"].startswith("file:")
        ]
    refs = {component["bom-ref"] for component in kept} | {root["bom-ref"]}
    document["components"] = kept
    document["dependencies"] = [
        {**one, "dependsOn": [ref for ref in one.get("dependsOn", []) if ref in refs]}
        for one in document["dependencies"]
        if one["ref"] in refs
    ]
    return document


def main() -> int:
    """Print the bill after a check against the schema of CycloneDX, which takes half a minute."""
    text = bill_of_materials(int(os.environ.get("SOURCE_DATE_EPOCH", "0")))
    error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    if error is not None:
        sys.stderr.write(f"the bill of materials is not valid: {error}\n")
        return 1
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
