"""schemathesis calls the gateway with valid data of the OpenAPI document and checks the answers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from schemathesis import openapi

from outbox_server.deploy.contract import read_descriptors, services_of
from outbox_server.deploy.envoy.files import openapi_text
from tests.gateway_stack import GatewayStack

CHECKS = (
    "not_a_server_error,response_schema_conformance,content_type_conformance,"
    "status_code_conformance"
)
# Watches are left out, because they are not single documents, and the drain of the only dispatcher.
LEFT_OUT = ":watch$|:drain$"
ALL_VERBS = ("GET", "POST", "PATCH", "DELETE")
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


def test_the_document_is_valid_and_has_every_url() -> None:
    descriptors = read_descriptors()
    schema = openapi.from_dict(json.loads(openapi_text(descriptors)))
    assert schema.validate() is None
    methods = [method for service in services_of(descriptors) for method in service.methods]
    urls = [url for method in methods for url in method.urls]
    assert len(list(schema.get_all_operations())) == len(urls) > 35


def test_an_answer_that_differs_from_the_document_is_found(
    gateway: GatewayStack, config: Path, tmp_path: Path
) -> None:
    document = json.loads(gateway.call("GET", "/openapi.json").body)
    document["components"]["schemas"]["Sender"]["required"].append("shoe_size")
    wrong = tmp_path / "openapi.json"
    wrong.write_text(json.dumps(document))
    done = schemathesis(gateway, config, str(wrong), "--include-operation-id", "GetSender")
    assert done.returncode == 1
    assert "shoe_size" in done.stdout


# Services, verbs and the kind of key. Services share a process, which needs as much CPU to start as
# for the calls of ten operations.
GROUPS = (
    (("SenderService",), ("GET", "PATCH", "POST"), "ann"),
    (("BatchService", "EmailJobService"), ALL_VERBS, "ann"),
    (
        (
            "StatsService",
            "SuppressionService",
            "ServerService",
            "UserService",
            "HoldService",
            "AuditService",
            "WebhookService",
        ),
        ALL_VERBS,
        "ann",
    ),
    (("DispatcherService", "ApiKeyService"), ALL_VERBS, "operator"),
    # The last operation deletes the sender.
    (("SenderService",), ("DELETE",), "ann"),
)


def operations(gateway: GatewayStack) -> Iterator[tuple[str, str, str]]:
    """Yield service, verb and id of each operation that is called."""
    document = json.loads(gateway.call("GET", "/openapi.json").body)
    for path, verbs in document["paths"].items():
        if not re.search(LEFT_OUT, path):
            for verb, operation in verbs.items():
                (service,) = operation["tags"]
                yield service, verb.upper(), operation["operationId"]


def test_every_operation_is_in_one_group(gateway: GatewayStack) -> None:
    chosen = [(name, verb) for names, verbs, _ in GROUPS for name in names for verb in verbs]
    for service, verb, operation in operations(gateway):
        assert chosen.count((service, verb)) == 1, operation


@pytest.mark.parametrize(("services", "verbs", "key"), GROUPS)
def test_every_answer_is_as_documented(
    gateway: GatewayStack,
    config: Path,
    services: tuple[str, ...],
    verbs: tuple[str, ...],
    key: str,
) -> None:
    # By id: schemathesis calls an operation that has one of several services or one of the verbs.
    ids = [
        operation
        for service, verb, operation in operations(gateway)
        if service in services and verb in verbs
    ]
    words = [word for one in ids for word in ("--include-operation-id", one)]
    done = schemathesis(gateway, config, f"{gateway.url}/openapi.json", *words, key=key)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
    assert f"Tested: {len(ids)}\n" in done.stdout, done.stdout
