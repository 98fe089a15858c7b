"""The systemd units, as systemd itself reads them."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest

from outbox_server.shared.durations import parse_duration
from outbox_server.shared.secret_files import SECRET_SETTINGS
from outbox_server.shared.settings import Settings

ROOT: Final = Path(__file__).parents[2]
UNITS: Final = ROOT / "deploy" / "systemd"
SERVICES: Final = ("scheduler", "dispatcher", "stats")
# The highest exposure level that systemd's review may report; a unit without limits has 10.
MAX_EXPOSURE: Final = 1.5


@pytest.fixture
def installed(tmp_path: Path) -> list[Path]:
    """The installed units, with our command in place of /opt/outbox/bin/outbox."""
    command = str(Path(sys.executable).with_name("outbox"))
    found = []
    for unit in sorted(UNITS.glob("*.service")):
        text = unit.read_text().replace("/opt/outbox/bin/outbox", command)
        for name in SERVICES if "@" in unit.name else ("",):
            path = tmp_path / unit.name.replace("@", f"@{name}")
            path.write_text(text)
            found.append(path)
    assert len(found) == 4
    return found


def analyze(verb: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    assert shutil.which("systemd-analyze"), "apt-get install systemd"
    return subprocess.run(
        ["systemd-analyze", verb, *words], capture_output=True, text=True, check=False
    )


def test_systemd_accepts_the_units(installed: list[Path]) -> None:
    done = analyze("verify", *installed)
    assert (done.returncode, done.stderr) == (0, "")


def test_systemd_notices_a_misspelled_option(installed: list[Path]) -> None:
    installed[0].write_text(installed[0].read_text().replace("ProtectHome=", "ProtectHomes="))
    assert "Unknown key 'ProtectHomes'" in analyze("verify", installed[0]).stderr


def test_the_services_are_locked_in(installed: list[Path]) -> None:
    done = analyze(
        "security", "--offline=true", "--no-pager", f"--threshold={MAX_EXPOSURE * 10:g}", *installed
    )
    assert done.returncode == 0, done.stdout


def units() -> dict[str, configparser.SectionProxy]:
    found = {}
    for path in UNITS.glob("*.service"):
        parser = configparser.RawConfigParser(strict=False)
        parser.optionxform = str  # type: ignore[assignment,method-assign]
        parser.read_string(path.read_text())
        found[path.name] = parser["Service"]
    return found


def test_a_service_has_time_to_drain_before_it_is_killed() -> None:
    service = units()["outbox@.service"]
    variables = (UNITS / "outbox.env").read_text()
    (grace,) = re.findall(r"(?m)^OUTBOX_SHUTDOWN_GRACE=(.*)$", variables)
    assert int(service["TimeoutStopSec"]) >= parse_duration(grace).total_seconds() + 10


def test_every_variable_is_a_setting_and_every_secret_comes_from_a_credential() -> None:
    text = "".join(path.read_text() for path in UNITS.iterdir())
    names = {name.removesuffix("_FILE").lower() for name in re.findall(r"\bOUTBOX_(\w+)=", text)}
    assert names <= Settings.model_fields.keys()
    for name in re.findall(r"(?m)^Environment=OUTBOX_(\w+)_FILE=%d/", text):
        assert name.lower() in SECRET_SETTINGS
    given = set(re.findall(r"%d/([\w-]+)", text))
    assert given == set(re.findall(r"(?m)^LoadCredential=([\w-]+):", text))
    assert not re.search(r"(?m)^OUTBOX_(DATABASE_URL|REDIS_URL|ENCRYPTION_KEYS|API_KEY)=", text)


def test_the_services_of_one_host_have_different_health_ports() -> None:
    listening = [(UNITS / f"{name}.env").read_text().splitlines()[-1] for name in SERVICES]
    assert len(set(listening)) == len(SERVICES)
    assert all(line.startswith("OUTBOX_HEALTH_LISTEN=127.0.0.1:") for line in listening)


def test_the_ports_of_the_services_are_reserved() -> None:
    """The kernel gives them to no outgoing connection, so that a restart finds them free."""
    text = (UNITS / "60-outbox.conf").read_text(encoding="utf-8")
    reserved: set[int] = set()
    for part in re.sub(r".*= ", "", text.splitlines()[-1]).split(","):
        first, _, last = part.partition("-")
        reserved |= {*range(int(first), int(last or first) + 1)}
    used = {
        int(str(field.default).rpartition(":")[2])
        for name, field in Settings.model_fields.items()
        if name in ("scheduler_listen", "dispatcher_listen", "stats_listen")
    }
    for file in UNITS.glob("*.env"):
        used |= {int(port) for port in re.findall(r"_LISTEN=\S+:(\d+)", file.read_text())}
    assert len(used) == 6
    assert used <= reserved


# Outgoing connections of a network of its own, which has eight ports for them. Prints those used.
CONNECT: Final = """
import socket
server = socket.create_server(("127.0.0.1", 1025))
clients = []
try:
    while True:
        clients.append(socket.create_connection(server.getsockname()))
except OSError:
    print(*sorted(client.getsockname()[1] for client in clients))
"""
IN_A_NETWORK: Final = """
set -e
ip link set lo up
echo '50048 50055' > /proc/sys/net/ipv4/ip_local_port_range
[ -z "$1" ] || /lib/systemd/systemd-sysctl "$1"
exec "$2" -c "$3"
"""


@pytest.mark.parametrize(
    ("file", "ports"),
    [("", range(50_048, 50_056)), ("60-outbox.conf", (50_048, 50_049, 50_050, 50_054, 50_055))],
)
def test_the_kernel_gives_a_reserved_port_to_no_outgoing_connection(
    file: str, ports: Sequence[int]
) -> None:
    path = str(UNITS / file) if file else ""
    words = ("unshare", "--net", "sh", "-c", IN_A_NETWORK, "sh", path, sys.executable, CONNECT)
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [int(port) for port in done.stdout.split()] == list(ports)
