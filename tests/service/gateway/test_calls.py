"""REST calls, streams and pages through the gateway."""

from __future__ import annotations

import json
from collections.abc import Iterator
from urllib.parse import quote, urlencode

import pytest

from outbox_server.deploy.envoy.routes import PAGES
from tests.gateway_stack import GatewayStack

ROWS = 10_000


def csv() -> bytes:
    rows = "".join(f"u{number}@example.com,{'x' * 600}\n" for number in range(ROWS))
    return f"email,name\n{rows}".encode()


def test_a_csv_of_any_size_is_uploaded_as_it_is(gateway: GatewayStack) -> None:
    query = urlencode(
        {
            "options.sender_id": gateway.sender(),
            "options.request_id": "file",
            # Here a plus sign means a space, as browsers and curl write it.
            "options.subject": "Hello {{ name }} & all",
            "options.body": "Hi + bye",
            "options.spacing": "0.250s",
            "options.schedule_time": "2099-01-01T00:00:00Z",
            "options.email_column": "email",
        }
    )
    path = f"/api/batches:uploadFile?{query}"
    # It exceeds the size limit of a message.
    content = csv()
    assert len(content) > 5 * 1024 * 1024
    answer = gateway.call("POST", path, content, key="ann", content_type="text/csv")
    assert answer.status == 200, answer
    batch = answer.document["batch"]
    assert batch["accepted_count"] == str(ROWS)
    assert (batch["subject"], batch["body"]) == ("Hello {{ name }} & all", "Hi + bye")
    assert (batch["spacing"], batch["email_column"]) == ("0.250s", "email")
    again = gateway.call("POST", path, content, key="ann").document
    assert (again["replayed"], again["batch"]["batch_id"]) == (True, batch["batch_id"])
    form = gateway.call("POST", path, b"--x", key="ann", content_type="multipart/form-data")
    assert (form.status, form.reason) == (400, "FILE_TYPE_INVALID")


def test_a_patch_without_a_mask_changes_the_fields_that_it_has(gateway: GatewayStack) -> None:
    path = f"/api/senders/{gateway.sender(display_name='Shop', min_gap='5s', hourly_limit=20)}"
    changed = gateway.call("PATCH", path, {"hourly_limit": 30}, key="ann").document
    assert (changed["hourly_limit"], changed["min_gap"]) == (30, "5s")
    assert changed["display_name"] == "Shop"
    # A field that is missing in the body is reset only if the mask names it.
    same = gateway.call("PATCH", path, {"display_name": ""}, key="ann").document
    assert same["display_name"] == "Shop"
    masked = f"{path}?update_mask=display_name,min_gap"
    reset = gateway.call("PATCH", masked, {"hourlyLimit": 40}, key="ann").document
    assert (reset["display_name"], reset["hourly_limit"]) == ("", 30)
    assert "min_gap" not in reset


def test_a_csv_in_json_and_an_address_in_a_url_arrive_whole(gateway: GatewayStack) -> None:
    odd = "a/b+c@example.com"
    created = gateway.call("POST", "/api/suppressions", {"email": odd}, key="ann")
    assert created.document["email"] == odd
    listed = gateway.call("GET", "/api/suppressions", key="ann").document
    assert odd in [each["email"] for each in listed["suppressions"]]
    path = f"/api/suppressions/{quote(odd, safe='')}"
    assert gateway.call("DELETE", path, key="ann").document == {}
    body = {
        "options": {
            "request_id": "csv",
            "sender_id": gateway.sender(),
            "subject": "Hi",
            "body": "Hi",
        },
        "csv": "ZW1haWwKY3N2LWluLWpzb25AZXhhbXBsZS5jb20K",
    }
    batch = gateway.call("POST", "/api/batches", body, key="ann").document["batch"]
    assert batch["accepted_count"] == "1"


def test_a_watch_is_one_document_per_line_and_ends_with_done(gateway: GatewayStack) -> None:
    batch_id = gateway.batch(gateway.sender())
    with gateway.calling("GET", f"/api/batches/{batch_id}:watch", key="ann") as answer:
        assert answer.getheader("content-type") == "application/json"
        first = json.loads(answer.readline())
        assert (first["batch"]["batch_id"], first["done"]) == (batch_id, False)
        gateway.call("POST", f"/api/batches/{batch_id}:cancel", {}, key="ann")
        *_, last = [json.loads(line) for line in answer]
    assert last["done"]
    assert last["batch"]["counts"]["cancelled_count"] == "1"


def events(lines: Iterator[bytes]) -> Iterator[dict[str, object]]:
    for line in lines:
        if line.strip():
            assert line.startswith(b"data: "), line
            yield json.loads(line.removeprefix(b"data: "))


def test_a_watch_is_a_stream_of_events_if_the_caller_asks_for_it(gateway: GatewayStack) -> None:
    sender_id = gateway.sender()
    path = f"/api/senders/{sender_id}/stats:watch"
    with gateway.calling("GET", path, key="ann", accept="text/event-stream") as answer:
        assert answer.getheader("content-type") == "text/event-stream"
        found = events(iter(answer))
        assert next(found)["done"] is False
        gateway.call("DELETE", f"/api/senders/{sender_id}", key="ann")
        *_, last = found
    assert last["done"] is True


def test_a_watch_that_fails_before_its_first_message_is_an_error(gateway: GatewayStack) -> None:
    answer = gateway.call("GET", "/api/batches/999999999:watch", key="ann")
    assert (answer.status, answer.reason) == (404, "BATCH_NOT_FOUND")


def test_a_watch_that_fails_later_ends_without_done(gateway: GatewayStack) -> None:
    batch_id = gateway.batch(gateway.sender())
    path = f"/api/batches/{batch_id}:watch"
    # At its deadline, either the service ends the stream or the gateway cuts the connection.
    answer = gateway.call("GET", path, key="ann", grpc_timeout="2S")
    assert answer.status == 200
    assert [json.loads(line)["done"] for line in answer.body.splitlines()] == [False]


@pytest.mark.parametrize(("path", "name", "kind"), PAGES)
def test_the_pages_need_no_key_and_load_nothing_from_elsewhere(
    gateway: GatewayStack, path: str, name: str, kind: str
) -> None:
    answer = gateway.call("GET", path, key=None)
    assert (answer.status, answer.headers["content-type"]) == (200, kind)
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert answer.body == (gateway.folder / "gateway" / name).read_bytes()
    if name.endswith(".html"):
        assert b"http" not in answer.body


def test_the_root_leads_to_the_page(gateway: GatewayStack) -> None:
    answer = gateway.call("GET", "/", key=None)
    assert (answer.status, answer.headers["location"]) == (302, f"{gateway.url}/docs")
