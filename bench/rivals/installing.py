"""Installs the rivals from PyPI and npm, into build/bench, in their locked or pinned versions."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_HERE: Final = Path(__file__).parent
_TARGET: Final = Path("build/bench")


@dataclass(slots=True)
class InstalledRivals:
    """Where the rivals are. They are installed when a row needs them."""

    _node: Path | None = None
    _python: Path | None = None

    def node(self) -> tuple[str, Path]:
        """Return the program `node` and the folder with our scripts and their packages."""
        if self._node is None:
            self._node = _install_node()
        return _program("node"), self._node

    def python(self) -> tuple[str, Path]:
        """Return the interpreter that has the packages, and the folder with our scripts."""
        if self._python is None:
            self._python = _install_python()
        return str(self._python), _HERE / "python"


def _program(name: str) -> str:
    """Return node or npm: of the machine, or of the wheel in this environment."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        raise RuntimeError(f"the rivals need {name}: apt-get install nodejs npm")
    return found


def _install_node() -> Path:
    target = (_TARGET / "node").resolve()
    target.mkdir(parents=True, exist_ok=True)
    sources = [path for path in (_HERE / "node").iterdir() if path.is_file()]
    for path in sources:
        shutil.copy(path, target / path.name)
    stamp = target / "node_modules" / f".{_digest(target / 'package-lock.json')}"
    if not stamp.exists():
        command = [_program("npm"), "ci", "--no-progress", "--loglevel", "error"]
        subprocess.run(command, cwd=target, check=True, stdout=sys.stderr)
        stamp.touch()
    return target


def _install_python() -> Path:
    target = (_TARGET / "python").resolve()
    requirements = _HERE / "python" / "requirements.txt"
    stamp = target / f".{_digest(requirements)}"
    if not stamp.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(target)], check=True)
        pip = [str(target / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--requirement", str(requirements)], check=True, stdout=sys.stderr)
        stamp.touch()
    return target / "bin" / "python"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
