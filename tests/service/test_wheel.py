"""The installed wheel adds one import name, whatever the folders of the repository are called."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).parent.parent.parent


def run(*argv: str, cwd: Path) -> str:
    done = subprocess.run(argv, cwd=cwd, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def test_the_wheel_works_beside_a_project_with_a_package_called_shared(tmp_path: Path) -> None:
    build = (sys.executable, "-m", "hatchling", "build", "--target", "wheel")
    run(*build, "--directory", str(tmp_path), cwd=ROOT)
    [wheel] = tmp_path.glob("*.whl")
    installed = tmp_path / "site-packages"
    with ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
        assert {top for top in tops if not top.endswith(".dist-info")} == {"outbox_server"}
        archive.extractall(installed)
    project = tmp_path / "project"
    for name in ("shared", "services", "cli", "deploy"):
        (project / name).mkdir(parents=True)
        (project / name / "__init__.py").write_text("OWNER = 'the project'\n", encoding="utf-8")

    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import shared, outbox_server.services.dispatcher.server as server\n"
        "print(shared.OWNER); print(server.__file__)"
    )
    owner, file = run(sys.executable, "-c", program, str(installed), cwd=project).splitlines()

    assert owner == "the project"
    assert file.startswith(str(installed))
