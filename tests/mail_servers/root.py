"""Root folders in which mail servers run (chroot), and the end of all processes in them.

Debian's Postfix, Exim and OpenSMTPD have fixed paths and user names. In its own root folder each
server finds them, but not the configuration, queues or users of this machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from outbox_server.deploy.child import CHILD_ENVIRONMENT, Child
from tests.eventually import eventually

_INSTALL: Final = Path(__file__).with_name("install.sh")
_INSTALLED: Final = Path(__file__).parents[2] / "build" / "mail-servers"
_COMMAND_LIMIT: Final = 30.0
_STOP_LIMIT: Final = 5.0
# Some servers close every possible descriptor when they start. A high limit makes this slow.
_OPEN_FILES: Final = "--nofile=4096"
# User ids inside a root folder. The machine has no users with these ids.
USERS: Final = {
    "root": 0,
    "nobody": 65534,
    "postfix": 64101,
    "postdrop": 64102,
    "Debian-exim": 64103,
    "opensmtpd": 64104,
    "opensmtpq": 64105,
    # The owner of the Maildir for all delivered mail.
    "inbox": 64106,
}


def why_servers_cannot_run() -> str:
    """Return what is missing, with the command that installs it, or an empty string."""
    if os.geteuid() != 0:
        return "Postfix, Exim and OpenSMTPD start as root: run `make test-mail-servers` as root"
    versions = _INSTALLED / "versions"
    script = hashlib.sha256(_INSTALL.read_bytes()).hexdigest()
    if not versions.exists() or not versions.read_text().startswith(script):
        return f"Postfix, Exim and OpenSMTPD are not in {_INSTALLED}: run `make mail-servers`"
    return ""


class Root:
    """A private copy of an installed server's root folder."""

    def __init__(self, server: str, folder: Path) -> None:
        """Copy the root folder of `server` to `folder`, which must not exist."""
        shutil.copytree(_INSTALLED / server, folder, symlinks=True, copy_function=_link)
        folder.chmod(0o755)
        # /proc/PID/root shows the resolved path.
        self.path: Final = folder.resolve()
        self._add_users()
        for name in ("tmp", "dev", "run", "var/log", "var/mail", "var/spool"):
            self.folder(name)
        self.path.joinpath("tmp").chmod(0o1777)
        # A regular file: /tmp may be mounted without devices. Servers only redirect to it.
        self.write("dev/null", "").chmod(0o666)
        if not (self.path / "var/run").exists():
            (self.path / "var/run").symlink_to("../run")

    def _add_users(self) -> None:
        lines = [f"{name}:x:{number}:" for name, number in USERS.items()]
        passwd = [f"{line}{USERS[line.split(':')[0]]}::/var/mail:/bin/sh" for line in lines]
        self.write("etc/passwd", "\n".join([*passwd, ""]))
        self.write("etc/group", "\n".join(["mail:x:8:", *lines, ""]))
        self.write("etc/hosts", "127.0.0.1 localhost\n")
        self.write("etc/resolv.conf", "")
        self.write("etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files\n")
        self.write("etc/services", "smtp 25/tcp\n")

    def folder(self, path: str, owner: str = "root", mode: int = 0o755, group: str = "") -> Path:
        """Create a folder with its parents; return it."""
        made = self.path / path
        made.mkdir(parents=True, exist_ok=True)
        os.chown(made, USERS[owner], USERS[group or owner])
        made.chmod(mode)
        return made

    def write(self, path: str, text: str, *, owner: str = "root", mode: int = 0o644) -> Path:
        """Write a file and create its folders; return the file."""
        file = self.path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        # It may be a link to the installed file, which must not change.
        file.unlink(missing_ok=True)
        file.write_text(text)
        os.chown(file, USERS[owner], USERS[owner])
        file.chmod(mode)
        return file

    def child(self, name: str, *argv: str, environment: Mapping[str, str] | None = None) -> Child:
        """Return a process inside the root folder that is not started yet."""
        return Child(
            name,
            ["/usr/bin/prlimit", _OPEN_FILES, "/usr/sbin/chroot", self.path, *argv],
            log=self.log,
            cwd=self.path,
            environment={**CHILD_ENVIRONMENT, **(environment or {})},
            death_signal=signal.SIGTERM,
        )

    @property
    def log(self) -> Path:
        """The standard output and error of the server's processes."""
        return self.path / "var/log/output.log"

    def run(self, *argv: str, stdin: str = "") -> str:
        """Run a command inside the root folder until it ends; return its output.

        Raises:
            AssertionError: its exit code is not 0.
        """
        done = subprocess.run(
            ["/usr/sbin/chroot", self.path, *argv],
            check=False,
            input=stdin,
            capture_output=True,
            text=True,
            env=CHILD_ENVIRONMENT,
            timeout=_COMMAND_LIMIT,
        )
        assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
        return done.stdout

    def processes(self) -> set[int]:
        """Return the ids of the processes whose root is this folder."""
        found = set()
        for entry in Path("/proc").glob("[0-9]*"):
            # The process has ended already.
            with contextlib.suppress(OSError):
                root = (entry / "root").readlink()
                # A server may confine itself further: its own root is then inside this folder.
                if root == self.path or self.path in root.parents:
                    found.add(int(entry.name))
        return found

    async def end_processes(self) -> None:
        """End every process inside the root folder: SIGTERM, after 5 s SIGKILL.

        A server's child processes leave its process group, so their root folder identifies them.
        """
        for number in (signal.SIGTERM, signal.SIGKILL):
            self._signal_all(number)
            with contextlib.suppress(AssertionError):
                await eventually(lambda: not self.processes(), _STOP_LIMIT)
                return
        raise AssertionError(f"processes {self.processes()} in {self.path} cannot be ended")

    def _signal_all(self, number: signal.Signals) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def remove(self) -> None:
        """Remove the folder when no process runs in it."""
        shutil.rmtree(self.path)


def _link(source: str, target: str) -> None:
    """Link a file of the installed server; copy it if it is on another file system."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
