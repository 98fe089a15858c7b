"""The compose file is consistent, its secrets are usable, and its containers are locked down."""

from __future__ import annotations

import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from sqlalchemy.engine import make_url

from outbox_server.cli.main import OutboxGroup
from outbox_server.shared.auth.keys import read_key
from outbox_server.shared.durations import parse_duration
from outbox_server.shared.secrets import SecretBox
from outbox_server.shared.settings import Settings

FOLDER: Final = Path(__file__).parents[2] / "deploy" / "compose"
COMPOSE: Final[dict[str, Any]] = yaml.safe_load((FOLDER / "compose.yaml").read_text())
SERVICES: Final[dict[str, dict[str, Any]]] = COMPOSE["services"]
OURS: Final = {
    name: one for name, one in SERVICES.items() if one["image"].partition(":")[0] == "outbox"
}


def test_every_part_that_is_named_exists() -> None:
    used = {source for one in SERVICES.values() for source in one.get("secrets", ())}
    assert used == COMPOSE["secrets"].keys()
    for one in SERVICES.values():
        assert set(one.get("depends_on", ())) <= SERVICES.keys()
        for volume in one.get("volumes", ()):
            source = volume.partition(":")[0]
            assert source in COMPOSE["volumes"] or (FOLDER / source).exists()
    scraped = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())["scrape_configs"]
    assert set(scraped[0]["dns_sd_configs"][0]["names"]) == {"scheduler", "dispatcher", "stats"}


def test_every_outbox_container_runs_a_command_with_settings_that_exist() -> None:
    assert len(OURS) == 6
    known = {f"OUTBOX_{name.upper()}" for name in Settings.model_fields}
    for one in OURS.values():
        assert one["command"][0] in OutboxGroup.entries
        for name, value in one.get("environment", {}).items():
            assert name.removesuffix("_FILE") in known
            if name.endswith("_FILE"):
                assert value.removeprefix("/run/secrets/") in one["secrets"]


def test_every_outbox_container_is_locked_down() -> None:
    for one in OURS.values():
        assert one["read_only"] is True
        assert one["cap_drop"] == ["ALL"]
        assert one["security_opt"] == ["no-new-privileges:true"]


def test_only_this_machine_reaches_the_ports_and_every_image_has_a_version() -> None:
    for one in SERVICES.values():
        assert all(port.startswith("127.0.0.1:") for port in one.get("ports", ()))
        tag = one["image"].partition(":")[2]
        assert tag not in ("", "latest")


@pytest.mark.parametrize("name", ["scheduler", "dispatcher", "stats"])
def test_a_service_has_time_to_drain_and_a_health_check(name: str) -> None:
    one = SERVICES[name]
    grace = Settings.model_fields["shutdown_grace"].default
    assert parse_duration(one["stop_grace_period"]) > grace
    assert one["healthcheck"]["test"] == ["CMD", "outbox", "health"]
    assert "OUTBOX_HEALTH_LISTEN" in one["environment"]


def test_the_secrets_that_the_script_makes_are_usable_and_kept(tmp_path: Path) -> None:
    script = shutil.copy(FOLDER / "make-secrets.sh", tmp_path)
    subprocess.run(["sh", script], check=True)
    folder = tmp_path / "secrets"
    made = {path.name: path.read_text() for path in folder.iterdir()}
    assert made.keys() == {Path(one["file"]).name for one in COMPOSE["secrets"].values()}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    # The image's user does not own the files.
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o644}

    assert read_key(made["api-key"])
    box = SecretBox([made["encryption-keys"]])
    assert box.decrypt(box.encrypt("secret")) == "secret"
    url = make_url(made["database-url"])
    assert (url.host, url.password) == ("postgres", made["postgres-password"])

    (folder / "api-key").unlink()
    subprocess.run(["sh", script], check=True)
    again = {path.name: path.read_text() for path in folder.iterdir()}
    assert again.pop("api-key") != made.pop("api-key")
    assert again == made
