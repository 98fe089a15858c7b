"""The OpenAPI document generated from the protos."""

from __future__ import annotations

import json
from typing import Any

import pytest

from outbox_server.deploy.contract import read_descriptors, services_of
from outbox_server.deploy.envoy.files import openapi_text


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(openapi_text(read_descriptors()))
    return found


def services() -> Any:
    return services_of(read_descriptors())


def test_every_method_is_described_with_its_comment(document: dict[str, Any]) -> None:
    described = {
        operation["operationId"]: operation["description"]
        for path in document["paths"].values()
        for operation in path.values()
    }
    methods = {
        method.path.rpartition("/")[2] for service in services() for method in service.methods
    }
    assert methods <= described.keys()
    assert all(described.values())
    assert described["GetSender"].startswith("Returns one sender.")


def test_paths_do_not_differ_in_the_names_of_variables_alone(document: dict[str, Any]) -> None:
    def shape(url: str) -> str:
        return "".join("{}" if part in "{}" else part for part in url.split("}"))

    paths = list(document["paths"])
    assert "/api/senders/{sender_id}" in paths
    assert document["paths"]["/api/senders/{sender_id}"].keys() == {"get", "patch", "delete"}
    assert len({shape(path) for path in paths}) == len(paths)


def schema_of(document: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = document["components"]["schemas"][name]
    return found


def test_requests_and_responses_have_separate_schemas(
    document: dict[str, Any],
) -> None:
    sent, returned = schema_of(document, "SenderInput"), schema_of(document, "Sender")
    assert sent["required"] == ["email"]
    assert "state" in returned["properties"].keys() - sent["properties"].keys()
    # A response always has a field without presence; an optional field or a message may be missing.
    assert {"sender_id", "display_name"} <= set(returned["required"])
    assert not {"hourly_limit", "cooldown", "smtp"} & set(returned["required"])
    assert "password" in schema_of(document, "SmtpEndpointInput")["properties"]
    assert "password" not in schema_of(document, "SmtpEndpoint")["properties"]
    patch = document["paths"]["/api/senders/{sender_id}"]["patch"]
    changed = patch["requestBody"]["content"]["application/json"]["schema"]
    assert "required" not in changed
    assert changed["properties"].keys() == sent["properties"].keys()


def test_values_are_described_in_their_json_form(document: dict[str, Any]) -> None:
    batch = schema_of(document, "Batch")["properties"]
    assert batch["accepted_count"]["type"] == "string"
    assert batch["create_time"]["format"] == "date-time"
    assert batch["state"]["$ref"].endswith("/BatchState")
    assert "BATCH_STATE_DONE" in schema_of(document, "BatchState")["enum"]
    request = schema_of(document, "ScheduleBatchRequest")
    assert request["allOf"] == [{"not": {"required": ["csv", "recipients"]}}]
    assert request["properties"]["csv"]["contentEncoding"] == "base64"
    columns = schema_of(document, "Recipient")["properties"]["columns"]
    assert columns["additionalProperties"] == {"type": "string"}
    query = {
        each["name"]: each
        for each in document["paths"]["/api/batches:uploadFile"]["post"]["parameters"]
    }
    assert query["options.sender_id"]["required"]
    assert query["options.spacing"]["schema"]["pattern"]
    forecast = document["paths"]["/api/batches/{batch_id}:forecast"]["get"]["parameters"]
    assert [each["name"] for each in forecast] == ["batch_id", "user_id"]
