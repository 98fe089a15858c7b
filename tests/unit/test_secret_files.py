"""Every secret can be read from a file; its variable has the suffix _FILE."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import SecretStr
from typer.testing import CliRunner

from outbox_server.cli.main import app
from outbox_server.shared.errors import ConfigurationError
from outbox_server.shared.secret_files import MAX_SECRET_BYTES, SECRET_SETTINGS
from outbox_server.shared.settings import Settings, load_settings

ROOT = Path(__file__).parents[2]
# The settings that only a URL can be the value of.
URLS = {
    "database_url": "postgresql://outbox:a%20secret@db/outbox",
    "redis_url": "redis://:a%20secret@cache/0",
}


def value_of(settings: Settings, name: str) -> str:
    value = getattr(settings, name)
    return value.get_secret_value() if isinstance(value, SecretStr) else str(value)


def refusal() -> str:
    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    assert "\n" not in caught.value.message
    return caught.value.message


@pytest.mark.parametrize("name", SECRET_SETTINGS)
@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_secret_comes_from_its_file_without_the_line_break_at_the_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, end: str
) -> None:
    file = tmp_path / "secret"
    value = URLS.get(name, " a secret")
    file.write_text(f"{value}{end}", newline="")
    monkeypatch.setenv(f"OUTBOX_{name.upper()}_FILE", str(file))
    settings = load_settings()
    assert value_of(settings, name) == value
    assert name in settings.model_fields_set


def test_every_secret_setting_and_every_url_that_may_hold_a_password_can_be_a_file() -> None:
    secrets = {
        name
        for name, field in Settings.model_fields.items()
        if field.annotation is SecretStr or name.endswith("_url")
    }
    assert secrets == set(SECRET_SETTINGS)
    help_text = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "1000"}).stdout
    pages = [(ROOT / page).read_text("utf-8") for page in ("README.md", "docs/operating.md")]
    for text in (help_text, *pages):
        assert all(f"OUTBOX_{name.upper()}_FILE" in text for name in SECRET_SETTINGS), text


def test_a_secret_given_twice_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("from the file")
    monkeypatch.setenv("OUTBOX_API_KEY", "from the variable")
    monkeypatch.setenv("OUTBOX_API_KEY_FILE", str(tmp_path / "key"))
    assert refusal() == "OUTBOX_API_KEY and OUTBOX_API_KEY_FILE are both set: unset one of them"


def test_a_file_env_of_the_current_folder_is_not_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text("OUTBOX_API_KEY=planted\nOUTBOX_SCHEDULER=evil.example:50051\n")
    monkeypatch.chdir(tmp_path)
    settings = load_settings()
    assert settings.api_key.get_secret_value() == ""
    assert "evil" not in str(settings.model_dump())


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("from the file")
    monkeypatch.setenv("OUTBOX_API_KEY", "")
    monkeypatch.setenv("OUTBOX_API_KEY_FILE", str(tmp_path / "key"))
    monkeypatch.setenv("OUTBOX_REDIS_URL_FILE", "")
    assert load_settings().api_key.get_secret_value() == "from the file"


def test_no_file_is_read_for_a_value_that_the_program_sets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OUTBOX_REDIS_URL_FILE", str(tmp_path / "missing"))
    assert load_settings(redis_url="redis://here/0").redis_url == "redis://here/0"


def test_an_unusable_file_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "url"
    monkeypatch.setenv("OUTBOX_DATABASE_URL_FILE", str(file))
    name = f"OUTBOX_DATABASE_URL_FILE: {file}"
    assert refusal() == f"{name} cannot be read: No such file or directory"
    file.write_bytes(b"\n")
    assert refusal() == f"{name} is empty"
    file.write_bytes(b"\xff\xfe")
    assert refusal() == f"{name} is not text in UTF-8"
    file.write_bytes(b"x" * (MAX_SECRET_BYTES + 1))
    assert refusal() == f"{name} has more than 65536 bytes, too many for a secret"
    file.write_bytes(b"postgresql://db/".ljust(MAX_SECRET_BYTES, b"x"))
    assert len(load_settings().database_url) == MAX_SECRET_BYTES
    file.unlink()
    file.mkdir()
    assert refusal() == f"{name} cannot be read: Is a directory"
    file.rmdir()
    os.mkfifo(file)
    assert refusal() == f"{name} is empty"
    monkeypatch.setenv("OUTBOX_DATABASE_URL_FILE", "/dev/zero")
    assert "has more than 65536 bytes" in refusal()
