"""Both distributions as they are published: built, installed side by side, and used."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from release.versions import project_version

ROOT = Path(__file__).parents[2]
SITE = sysconfig.get_path("purelib")


def run(*words: str | Path, cwd: Path = ROOT) -> str:
    done = subprocess.run(words, cwd=cwd, capture_output=True, check=False, text=True, timeout=120)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheels. The client's is built from its sdist, which must therefore be complete."""
    folder = tmp_path_factory.mktemp("wheels")
    run(
        sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT / "client"
    )
    (sdist,) = folder.glob("*.tar.gz")
    wheel = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder)
    run(sys.executable, *wheel, sdist, ROOT)
    return {path.name.partition("-")[0]: path for path in folder.glob("*.whl")}


@pytest.fixture(scope="module")
def installed(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both distributions."""
    folder = tmp_path_factory.mktemp("installed")
    install(folder, *wheels.values())
    return folder


def python(program: str, *folders: Path) -> str:
    """Run a program that can import what is in folders and the dependencies, but not the sources.

    Without `site`, the editable installation of the sources is not on the import path.
    """
    ours = [str(folder) for folder in folders]
    paths = f"import sys; sys.path[:0] = {ours!r}; sys.path.append({SITE!r})\n"
    return run(sys.executable, "-I", "-S", "-c", paths + program, cwd=folders[0])


def install(folder: Path, *wheels: Path) -> None:
    options = ("--quiet", "--no-deps", "--no-index", "--no-compile", "--target", folder)
    run(sys.executable, "-m", "pip", "install", *options, *wheels)


def test_no_file_belongs_to_two_distributions(wheels: dict[str, Path]) -> None:
    names = [set(zipfile.ZipFile(wheel).namelist()) for wheel in wheels.values()]
    assert len(names) == 2
    assert names[0] & names[1] == set()


def test_the_client_works_without_the_server_package(
    wheels: dict[str, Path], tmp_path: Path
) -> None:
    install(tmp_path, wheels["outbox_client"])
    program = (
        "import importlib.resources, importlib.util\n"
        "import outbox_client, outbox.v1\n"
        "from outbox.v1.batch_pb2 import BatchOptions\n"
        "outbox_client.Client().close()\n"
        "found = [importlib.util.find_spec(name) for name in ('outbox_server', 'shared', 'cli')]\n"
        "files = importlib.resources.files('outbox.v1'), importlib.resources.files(outbox_client)\n"
        "print(found, outbox_client.__file__)\n"
        "print((files[0] / 'outbox.binpb').is_file(), (files[1] / 'py.typed').is_file())\n"
    )
    shown = python(program, tmp_path).splitlines()
    assert shown == [
        f"[None, None, None] {tmp_path / 'outbox_client' / '__init__.py'}",
        "True True",
    ]


def test_the_command_line_works_beside_the_client(installed: Path) -> None:
    program = (
        "import outbox_server.cli.schedule, outbox_server.services.scheduler.server\n"
        "from outbox_server.cli.main import main\n"
        "print(outbox_server.cli.__file__)\n"
        "sys.argv = ['outbox', '--version']\n"
        "main()\n"
    )
    shown = python(program, installed).splitlines()
    assert shown == [
        str(installed / "outbox_server" / "cli" / "__init__.py"),
        f"outbox {project_version()}",
    ]


def test_services_start_without_the_libraries_of_the_command_line(installed: Path) -> None:
    program = (
        "for name in ('plotext', 'pygal', 'rich', 'typer'):\n"
        "    sys.modules[name] = None\n"
        "import outbox_server.services.dispatcher.server, outbox_server.services.stats.server\n"
        "import outbox_server.services.scheduler.server\n"
        "from outbox_server.cli.__main__ import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as exit:\n"
        "    print(exit.code)\n"
    )
    (shown,) = python(program, installed).splitlines()
    assert shown.startswith("outbox: the command line is not installed: pip install 'outbox[cli]'")


def test_the_servers_work_beside_a_project_with_packages_of_the_same_names(
    wheels: dict[str, Path], installed: Path, tmp_path: Path
) -> None:
    """Each wheel adds one import name, which does not depend on the repository's folder names."""
    for name in ("shared", "services", "cli", "deploy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("OWNER = 'project'\n", encoding="utf-8")
    program = (
        "import shared, services, cli, deploy\n"
        "import outbox_server.services.dispatcher.server, outbox_server.cli.schedule\n"
        "import outbox_server.deploy.embedded.stack\n"
        "print(*(package.OWNER for package in (shared, services, cli, deploy)))\n"
    )
    assert python(program, tmp_path, installed).split() == ["project"] * 4
    names = {name.partition("/")[0] for name in zipfile.ZipFile(wheels["outbox"]).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"outbox_server"}
