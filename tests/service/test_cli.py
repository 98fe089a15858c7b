"""The parts of the command line that need no server: help, usage, addresses, texts."""

from __future__ import annotations

import dataclasses
import importlib
import json
import socket
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import typer
from outbox.v1.email_job_pb2 import EmailJob, EmailJobState
from outbox.v1.email_job_service_pb2 import ListEmailJobsResponse
from typer.main import get_command
from typer.testing import CliRunner

from outbox_server.cli import output
from outbox_server.cli.addresses import find_address
from outbox_server.cli.demo_report import ExpectedMails, report_on, to_document
from outbox_server.cli.main import OutboxGroup, app
from outbox_server.cli.options import read_time
from outbox_server.deploy.embedded.encryption_key import key_in
from outbox_server.deploy.embedded.service import environment_of
from outbox_server.deploy.record import ReceivedMail
from outbox_server.shared.secrets import SecretBox
from outbox_server.shared.settings import Settings, load_settings

runner = CliRunner()


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the developer's OUTBOX_* variables, and use a folder without a stack."""
    monkeypatch.chdir(tmp_path)
    for name in Settings.model_fields:
        monkeypatch.delenv(f"OUTBOX_{name.upper()}", raising=False)


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_listing_the_commands_imports_neither_grpc_nor_pydantic_nor_sqlalchemy() -> None:
    program = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from cli.main import app\n"
        "result = CliRunner().invoke(app, ['--help'])\n"
        "assert result.exit_code == 0, result.output\n"
        "heavy = {'grpc', 'pydantic', 'sqlalchemy', 'redis', 'google.protobuf'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True)
    assert ended.returncode == 0, ended.stderr.decode()


@pytest.mark.parametrize("name", OutboxGroup.entries)
def test_every_listed_command_has_its_own_help(name: str) -> None:
    shown = runner.invoke(app, [name, "--help"])
    assert shown.exit_code == 0
    assert f"Usage: outbox {name}" in shown.output.replace("Usage: root", "Usage: outbox")
    group = get_command(importlib.import_module(OutboxGroup.entries[name].module).app)
    for command in getattr(group, "commands", {}):
        assert runner.invoke(app, [name, command, "--help"]).exit_code == 0


def test_the_version_is_that_of_the_package() -> None:
    shown = runner.invoke(app, ["--version"])
    assert (shown.exit_code, shown.stdout) == (0, "outbox 0.1.0\n")


@pytest.mark.parametrize(
    "words",
    [
        ["sender"],
        ["senders", "get"],
        ["senders", "create", "--email", "a@b.de", "--min-gap", "2 parsecs"],
        ["senders", "create", "--email", "a@b.de", "--smtp-port", "25"],
        ["senders", "create", "--email", "a@b.de", "--smtp-ca", "ca.pem"],
        ["senders", "create", "--email", "a@b.de", "--smtp-host", "x", "--smtp-ca", "/no/such"],
        ["senders", "update", "1"],
        ["senders", "update", "1", "--sending-hours", "mon-fri 09:00-17:00"],
        ["senders", "list", "--state", "asleep"],
        ["jobs", "list", "--page-size", "-1"],
        ["schedule", "x.csv", "--sender", "1", "--schedule-time", "2026-12-24T18:00:00"],
        ["schedule", "x.csv", "--sender", "1", "--body", "a", "--body-file", "b"],
        ["up", "--dispatchers", "0"],
        ["up", "--smtp", "relay:25"],
    ],
)
def test_wrong_usage_exits_with_code_2_and_an_empty_stdout(words: list[str]) -> None:
    refused = runner.invoke(app, words)
    assert (refused.exit_code, refused.stdout) == (2, "")


def test_an_invalid_variable_exits_with_code_2_and_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OUTBOX_MIN_GAP", "soon")
    refused = runner.invoke(app, ["senders", "list"])
    assert refused.exit_code == 2
    assert "OUTBOX_MIN_GAP" in refused.stderr


def test_the_error_for_no_answer_names_the_address_and_what_to_do() -> None:
    address = f"127.0.0.1:{closed_port()}"
    failed = runner.invoke(app, ["senders", "get", "1", "--server", address])
    assert (failed.exit_code, failed.stdout) == (1, "")
    assert failed.stderr == (
        f"outbox: nothing listens at {address} (--server): start the scheduler there, "
        "or name the address of the scheduler with --server\n"
    )


def test_an_address_comes_from_option_then_variable_then_stack_then_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert find_address("stats", None).target == "127.0.0.1:50053"
    Path(".outbox").mkdir()
    stack = {"scheduler": "127.0.0.1:1", "stats": "127.0.0.1:2", "dispatchers": ["127.0.0.1:3"]}
    Path(".outbox/endpoints.json").write_text(json.dumps(stack))
    found = {name: find_address(name, None).target for name in ("scheduler", "dispatcher", "stats")}
    assert found == {
        "scheduler": "127.0.0.1:1",
        "dispatcher": "127.0.0.1:3",
        "stats": "127.0.0.1:2",
    }
    monkeypatch.setenv("OUTBOX_STATS_LISTEN", "0.0.0.0:9")
    assert find_address("stats", None).target == "127.0.0.1:9"
    assert find_address("stats", "example.com:7").target == "example.com:7"


def test_a_broken_stack_file_is_named() -> None:
    Path(".outbox").mkdir()
    Path(".outbox/endpoints.json").write_text("{")
    failed = runner.invoke(app, ["stats", "user", "u"])
    assert failed.exit_code == 1
    assert ".outbox/endpoints.json cannot be read" in failed.stderr


def test_a_missing_csv_fails_before_any_call() -> None:
    failed = runner.invoke(app, ["schedule", "nope.csv", "--sender", "1", "--request", "r"])
    assert failed.exit_code == 1
    assert failed.stderr == "outbox: nope.csv cannot be read: No such file or directory\n"


def test_a_generated_encryption_key_is_accepted_by_the_services() -> None:
    made = runner.invoke(app, ["keys", "generate-encryption-key"])
    box = SecretBox([made.stdout.strip()])
    assert box.decrypt(box.encrypt("secret")) == "secret"
    document = json.loads(
        runner.invoke(app, ["keys", "generate-encryption-key", "-o", "json"]).stdout
    )
    assert SecretBox([document["encryption_key"]])


def test_the_key_of_a_stack_is_created_once_and_readable_only_by_its_owner(tmp_path: Path) -> None:
    key = key_in(tmp_path)
    assert key_in(tmp_path) == key
    assert stat.S_IMODE((tmp_path / "encryption_key").stat().st_mode) == 0o600


def test_times_are_rfc_3339_or_now_or_relative() -> None:
    assert read_time("2026-12-24T18:00:00+01:00") == datetime(2026, 12, 24, 17, tzinfo=UTC)
    assert read_time("2026-12-24T17:00:00Z") == datetime(2026, 12, 24, 17, tzinfo=UTC)
    for text, later in (("now", timedelta(0)), ("in 10m", timedelta(minutes=10))):
        distance = read_time(text) - datetime.now(UTC) - later
        assert abs(distance) < timedelta(seconds=5)
    with pytest.raises(typer.BadParameter, match="no UTC offset"):
        read_time("2026-12-24T18:00:00")


def test_services_receive_only_the_variables_that_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {
        "OUTBOX_MIN_GAP": "250ms",
        "OUTBOX_RETRY_BACKOFF": "1s,90s",
        "OUTBOX_SMTP_OVERRIDE": "true",
        "OUTBOX_ENCRYPTION_KEYS": "secret",
        "OUTBOX_SMTP_POOL": "7",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    reported = environment_of(load_settings())
    assert reported == variables | {"OUTBOX_RETRY_BACKOFF": "1s,90s"}


def test_services_receive_absolute_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OUTBOX_REPLY_RULES", "rules.toml")
    monkeypatch.setenv("OUTBOX_SMTP_CA", "/etc/ca.pem")
    monkeypatch.setenv("OUTBOX_TLS_CLIENT_CA", "")
    assert environment_of(load_settings()) == {
        "OUTBOX_REPLY_RULES": str(tmp_path / "rules.toml"),
        "OUTBOX_SMTP_CA": "/etc/ca.pem",
        "OUTBOX_TLS_CLIENT_CA": "",
    }


def test_json_output_is_proto_json_with_original_names_and_zeros(
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = EmailJob(email_job_id="7", state=EmailJobState.EMAIL_JOB_STATE_SENT)
    output.show(job, output.OutputFormat.JSON)
    document = json.loads(capsys.readouterr().out)
    assert document["email_job_id"] == "7"
    assert (document["state"], document["attempt_count"]) == ("EMAIL_JOB_STATE_SENT", 0)


def test_a_table_is_not_cut_in_a_pipe_and_cannot_control_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    long = "x" * 300
    page = ListEmailJobsResponse(
        email_jobs=[EmailJob(recipient=long, last_error="550 \x1b[2J[red]no[/red]")],
        next_page_token="more",
    )
    output.show_list(
        page, "email_jobs", ("recipient", "last_error"), output.OutputFormat.TABLE, what="jobs"
    )
    printed = capsys.readouterr()
    assert f"{long}   550 \\x1b[2J[red]no[/red]" in printed.out
    assert "\x1b" not in printed.out
    assert printed.err == "more results: use --all, or --page-token more\n"


def mail(number: int, started_at: float, received_at: float) -> ReceivedMail:
    return ReceivedMail(started_at, received_at, "a@b.de", ("x@y.de",), f"<{number}>", 1, "")


def expected(names: int) -> ExpectedMails:
    return ExpectedMails(
        sender_id="1",
        email="a@b.de",
        hourly_limit=2,
        min_gap_s=1.0,
        accepted=names,
        rejected=0,
        sent=names,
        failed=0,
        message_ids=frozenset(f"<{number}>" for number in range(names)),
    )


def test_the_demo_report_is_clean_if_every_promise_held() -> None:
    mails = [mail(0, 0.0, 0.5), mail(1, 1.5, 2.0), mail(2, 10.5, 11.0)]
    report = report_on(expected(3), mails, 10.0)
    assert (report.broken, report.lost, report.duplicates) == ([], 0, 0)
    document = to_document([report], window_s=10.0, seconds=1.0, inbox="x")
    assert (document["least_gap_s"], document["most_in_window"]) == (1.0, 2)


def test_the_demo_report_names_each_broken_promise() -> None:
    mails = [mail(0, 0.0, 0.5), mail(1, 1.0, 2.0), mail(1, 8.0, 9.0)]
    report = report_on(expected(3), mails, 10.0)
    assert (report.lost, report.duplicates, report.least_gap_s, report.most_in_window) == (
        1,
        1,
        0.5,
        3,
    )
    assert len(report.broken) == 4


def test_a_job_missing_from_every_record_counts_as_lost() -> None:
    nameless = dataclasses.replace(expected(2), accepted=3)
    report = report_on(nameless, [mail(0, 0.0, 0.5), mail(1, 1.5, 2.0)], 10.0)
    assert report.lost == 1


def test_up_without_the_embedded_servers_names_the_package_to_install() -> None:
    program = (
        "import sys\n"
        "sys.modules['aiosmtpd'] = None\n"
        "from cli.main import main\n"
        "sys.argv = ['outbox', 'up']\n"
        "main()\n"
    )
    failed = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    assert failed.returncode == 1
    assert failed.stderr == (
        "outbox: the embedded stack is not installed: pip install 'outbox[local]'\n"
    )
