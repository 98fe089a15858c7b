"""`python -m release`: builds everything that a release publishes into build/release/.

The sources are taken from the commit, not from the work tree, and every time in the results is the
time of the commit. So two builds of a commit with the same libraries give the same files.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Final

from release import licenses
from release.dependencies import OURS, production_lock
from release.revisions import released_revisions
from release.sbom import bill_of_materials
from release.versions import mismatches, project_version

_OUTPUT: Final = Path("build") / "release"
# The targets of hatchling, for each of the two distributions.
_BUILDS: Final = (("client", "sdist"), ("client", "wheel"), (".", "wheel"))


class ReleaseRefusedError(Exception):
    """Nothing was built. The text says what is wrong."""


def build(root: Path, output: Path) -> list[str]:
    """Build the release of the commit that is checked out in `root`; return the file names.

    Raises:
        ReleaseRefusedError: the work tree has changes, or versions differ.
    """
    _check(root)
    version = project_version(root)
    epoch = int(_git(root, "log", "-1", "--format=%ct"))
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    prefix = f"outbox-{version}"
    archive = _git_bytes(root, "archive", f"--prefix={prefix}/", "HEAD")
    # The recipe of the image is in it: deploy/image copies the whole source.
    (output / f"{prefix}-source.tar.gz").write_bytes(gzip.compress(archive, mtime=epoch))
    with tempfile.TemporaryDirectory(prefix="outbox-release-") as name:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(name, filter="data")
        source = Path(name) / prefix
        for folder, target in _BUILDS:
            _hatchling(source / folder, target, output, epoch)
        for chart in sorted(source.glob("deploy/chart/*/Chart.yaml")):
            _package_chart(chart.parent, output, epoch)
    lock = (root / "requirements.lock").read_text(encoding="utf-8")
    texts = {
        f"{prefix}-requirements.txt": production_lock(lock),
        f"{prefix}-licenses.md": licenses.page(),
        f"{prefix}-sbom.cdx.json": bill_of_materials(epoch),
    }
    for file, text in texts.items():
        (output / file).write_text(text, encoding="utf-8")
    names = sorted(path.name for path in output.iterdir())
    sums = "".join(
        f"{hashlib.sha256((output / name).read_bytes()).hexdigest()}  {name}\n" for name in names
    )
    (output / "SHA256SUMS").write_text(sums, encoding="utf-8")
    return [*names, "SHA256SUMS"]


def _check(root: Path) -> None:
    changes = _git(root, "status", "--porcelain")
    if changes:
        first = changes.splitlines()[0]
        raise ReleaseRefusedError(
            f"the work tree has changes, such as {first!r}: commit them, or remove them"
        )
    wrong = mismatches(root)
    if wrong:
        raise ReleaseRefusedError("; ".join(wrong) + ": run python -m release.versions --write")
    version = project_version(root)
    for name in sorted(OURS):
        installed = importlib.metadata.version(name)
        if installed != version:
            raise ReleaseRefusedError(f"{name} is installed as {installed}: run make setup")
    if version not in released_revisions(root):
        raise ReleaseRefusedError(
            f".ci/released-revisions has no line for {version}: run make release-revision"
        )


def _hatchling(folder: Path, target: str, output: Path, epoch: int) -> None:
    # The commands that generate code lie beside the interpreter.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", output.absolute()],
        cwd=folder,
        env={**os.environ, "PATH": path, "SOURCE_DATE_EPOCH": str(epoch)},
        capture_output=True,
        check=False,
        text=True,
        timeout=300,
    )
    if done.returncode:
        raise RuntimeError(f"hatchling failed in {folder}: {done.stdout}{done.stderr}")


def _package_chart(chart: Path, output: Path, epoch: int) -> None:
    """Package a chart with Helm's own code, then replace the times that it writes."""
    import helm_python  # noqa: PLC0415 - loads Helm, which a build without a chart spares

    with tempfile.TemporaryDirectory(prefix="outbox-chart-") as folder:
        packaged = Path(helm_python.package(chart, destination=folder))
        plain = io.BytesIO()
        with (
            tarfile.open(packaged) as source,
            tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT) as target,
        ):
            for member in sorted(source.getmembers(), key=lambda one: one.name):
                member.mtime = epoch
                member.pax_headers = {}
                target.addfile(member, source.extractfile(member))
        (output / packaged.name).write_bytes(gzip.compress(plain.getvalue(), mtime=epoch))


def _git(root: Path, *words: str) -> str:
    return _git_bytes(root, *words).decode().strip()


def _git_bytes(root: Path, *words: str) -> bytes:
    done = subprocess.run(["git", *words], cwd=root, capture_output=True, check=False, timeout=300)
    if done.returncode:
        raise ReleaseRefusedError(f"git {words[0]} failed: {done.stderr.decode().strip()}")
    return done.stdout


def main() -> int:
    """Build; 1 if there was nothing to build from."""
    root = Path.cwd()
    try:
        names = build(root, root / _OUTPUT)
    except (ReleaseRefusedError, ValueError) as error:
        sys.stderr.write(f"no release: {error}\n")
        return 1
    sys.stdout.write("".join(f"{_OUTPUT / name}\n" for name in names))
    return 0


if __name__ == "__main__":
    sys.exit(main())
