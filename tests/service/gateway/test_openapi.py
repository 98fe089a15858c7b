"""schemathesis calls the gateway with valid data of the OpenAPI document and checks the answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gateway_stack import GatewayStack

CHECKS = (
    "not_a_server_error,response_schema_conformance,content_type_conformance,"
    "status_code_conformance"
)
# Watches are left out, because they are not single documents, and the drain of the only dispatcher.
LEFT_OUT = ":watch$|:drain$"
# The number of examples of each operation; some are valid, and some are not.
EXAMPLES = 8


@pytest.fixture(scope="session")
def config(gateway: GatewayStack, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ids of resources that exist, since random ones would be refused before anything is read."""
    sender_id = gateway.sender(min_gap="5s", sending_hours=HOURS)
    batch_id = gateway.batch(sender_id, "a@example.com", "b@example.com")
    jobs = gateway.call("GET", f"/api/email-jobs?batch_id={batch_id}", key="ann").document
    ids = {
        "path.sender_id": sender_id,
        "path.batch_id": batch_id,
        "path.email_job_id": jobs["email_jobs"][0]["email_job_id"],
        "path.user_id": "ann",
        "query.user_id": "ann",
        "query.sender_id": sender_id,
        "query.batch_id": batch_id,
        "query.options.sender_id": sender_id,
    }
    file = tmp_path_factory.mktemp("schemathesis") / "schemathesis.toml"
    file.write_text(
        "[parameters]\n" + "".join(f'"{name}" = "{value}"\n' for name, value in ids.items())
    )
    return file


HOURS = {"start": "00:00", "end": "24:00", "time_zone": "UTC", "weekdays": ["WEEKDAY_MONDAY"]}


def schemathesis(
    gateway: GatewayStack, config: Path, document: str, *words: str, key: str = "ann"
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            Path(sys.executable).with_name("schemathesis"),
            *("--config-file", config, "--no-color", "run", document, "--url", gateway.url),
            *("--header", f"authorization: Bearer {gateway.keys[key]}"),
            *("--phases", "fuzzing", "--max-examples", str(EXAMPLES)),
            "--generation-deterministic",
            *("--checks", CHECKS, "--warnings", "off", "--exclude-path-regex", LEFT_OUT),
            *("--request-timeout", "30", *words),
        ],
        cwd=config.parent,
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_answer_that_differs_from_the_document_is_found(
    gateway: GatewayStack, config: Path, tmp_path: Path
) -> None:
    document = json.loads(gateway.call("GET", "/openapi.json").body)
    document["components"]["schemas"]["Sender"]["required"].append("smtp")
    wrong = tmp_path / "openapi.json"
    wrong.write_text(json.dumps(document))
    done = schemathesis(gateway, config, str(wrong), "--include-operation-id", "GetSender")
    assert done.returncode == 1
    assert "'smtp' is a required property" in done.stdout or '"smtp"' in done.stdout


@pytest.mark.parametrize(
    ("service", "verbs"),
    [
        ("SenderService", ("GET", "PATCH", "POST")),
        ("BatchService", ("GET", "POST")),
        ("EmailJobService", ("GET", "POST", "DELETE")),
        ("StatsService", ("GET", "POST")),
        ("SuppressionService", ("GET", "POST", "DELETE")),
        # The last operation deletes the sender.
        ("SenderService", ("DELETE",)),
    ],
)
def test_every_answer_is_as_documented(
    gateway: GatewayStack, config: Path, service: str, verbs: tuple[str, ...]
) -> None:
    methods = [word for verb in verbs for word in ("--include-method", verb)]
    done = schemathesis(
        gateway, config, f"{gateway.url}/openapi.json", "--include-tag", service, *methods
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr


def test_an_operator_sees_the_dispatcher_as_documented(gateway: GatewayStack, config: Path) -> None:
    document = f"{gateway.url}/openapi.json"
    only = ("--include-tag", "DispatcherService")
    done = schemathesis(gateway, config, document, *only, key="operator")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
