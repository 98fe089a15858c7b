"""The licences of the production dependencies. `python -m release.licenses` prints the list."""

from __future__ import annotations

import re
import sys
from importlib.metadata import Distribution
from typing import Any, Final

from license_expression import Licensing

from release.dependencies import OURS, production_distributions

ALLOWED: Final = frozenset(
    {
        "Apache-2.0",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "ISC",
        "MIT",
        "MIT-0",
        "PSF-2.0",
        "Unlicense",
    }
)
_LIBRARY: Final = (
    "used unmodified, as a separate package that users can replace; a work that uses it so may "
    "have any licence"
)
# Packages with another licence, and why they may be used.
JUSTIFIED: Final = {
    "certifi": ("MPL-2.0", "used unmodified; the licence covers its own files only"),
    "psycopg": ("LGPL-3.0-only", _LIBRARY),
    "psycopg-binary": ("LGPL-3.0-only", _LIBRARY),
    "pygal": ("LGPL-3.0-or-later", _LIBRARY),
}
# What older metadata say instead of an SPDX expression.
_SPDX: Final = {
    "3-Clause BSD License": "BSD-3-Clause",
    "GNU LGPL v3+": "LGPL-3.0-or-later",
    "ISC License": "ISC",
    "License :: OSI Approved :: MIT License": "MIT",
    "MIT License": "MIT",
}
_SPDX_TEXT: Final = re.compile(r"[\w.()+-]+(?: (?:AND|OR|WITH) [\w.()+-]+)*")


def license_of(distribution: Distribution) -> str:
    """Return the SPDX expression of a package, or "" if its metadata do not say one."""
    metadata: Any = distribution.metadata
    said = [
        metadata.get("License-Expression"),
        metadata.get("License"),
        *(metadata.get_all("Classifier") or []),
    ]
    for text in filter(None, said):
        spdx: str = _SPDX.get(text, text)
        if "::" not in spdx and "\n" not in spdx and _SPDX_TEXT.fullmatch(spdx):
            return spdx
    return ""


def is_allowed(name: str, expression: str) -> bool:
    """Whether a package with this licence may be a production dependency."""
    if not expression:
        return False
    if name in JUSTIFIED and JUSTIFIED[name][0] == expression:
        return True
    licensing = Licensing()

    def allowed(node: Any) -> bool:
        if isinstance(node, licensing.OR):
            return any(map(allowed, node.args))
        if isinstance(node, licensing.AND):
            return all(map(allowed, node.args))
        return str(node) in ALLOWED

    return allowed(licensing.parse(expression))


def page() -> str:
    """Return the list of all production dependencies with their licences, as Markdown."""
    lines = [
        "# Licences of the production dependencies",
        "",
        "| package | version | licence | note |",
        "| --- | --- | --- | --- |",
    ]
    for name, distribution in production_distributions().items():
        if name not in OURS:
            note = JUSTIFIED.get(name, ("", ""))[1]
            license_ = license_of(distribution) or "unknown"
            lines.append(f"| {name} | {distribution.version} | {license_} | {note} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
