"""Errors over REST: those of the services, and those of Envoy itself."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest

from outbox_server.deploy.envoy.gateway import HEALTH
from outbox_server.deploy.envoy.replies import REASONS
from tests.eventually import eventually
from tests.gateway_stack import GatewayStack
from tests.listeners import listening_ports


def test_an_error_of_a_service_has_its_status_and_all_details(gateway: GatewayStack) -> None:
    missing = gateway.call("GET", "/api/senders/999999999")
    assert (missing.status, missing.reason) == (404, "SENDER_NOT_FOUND")
    refused = gateway.call("POST", "/api/senders", {"email": "nobody"}, key="ann")
    assert (refused.status, refused.reason) == (400, "ADDRESS_INVALID")
    (violation,) = refused.document["details"][1]["field_violations"]
    assert violation["field"] == "sender.email"
    used = {"request_id": "once"}
    sender_id = gateway.sender()
    gateway.batch(sender_id, **used)
    body = {
        "options": {"sender_id": sender_id, "subject": "Other", "body": "Hi", **used},
        "recipients": {"rows": [{"email": "a@example.com"}]},
    }
    waiting = gateway.call("DELETE", f"/api/senders/{sender_id}", key="ann")
    assert (waiting.status, waiting.reason) == (400, "SENDER_HAS_OPEN_JOBS")
    again = gateway.call("POST", "/api/email-jobs/schedule", body, key="ann")
    assert (again.status, again.reason) == (409, "REQUEST_ID_REUSED")


def test_a_call_needs_a_key_and_reaches_only_what_its_user_owns(gateway: GatewayStack) -> None:
    sender_id = gateway.sender("ann")
    path = f"/api/senders/{sender_id}"
    assert gateway.call("GET", path, key="ann").document["sender_id"] == sender_id
    nobody = gateway.call("GET", path, key=None)
    assert (nobody.status, nobody.reason) == (401, "API_KEY_MISSING")
    other = gateway.call("GET", path, key="bob")
    assert (other.status, other.reason) == (404, "SENDER_NOT_FOUND")
    wrong = gateway.call("GET", "/api/senders?user_id=ann", key="bob")
    assert (wrong.status, wrong.reason) == (403, "USER_MISMATCH")
    for key, status in (("ann", 403), ("service", 403), ("operator", 200)):
        assert gateway.call("GET", "/api/dispatcher", key=key).status == status


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (("GET", "/api/nothing"), (404, "GATEWAY_NO_SUCH_CALL"), "/api/nothing"),
        (("PUT", "/api/senders/1", {}), (404, "GATEWAY_NO_SUCH_CALL"), "/api/senders/1"),
        (("GET", "/api/senders?nonsense=1"), (400, "GATEWAY_BAD_REQUEST"), "nonsense"),
        (("GET", "/api/email-jobs?state=sent"), (400, "GATEWAY_BAD_REQUEST"), "sent"),
        (("POST", "/api/senders", b"{bad"), (400, "GATEWAY_BAD_REQUEST"), "bad"),
        (("POST", "/api/senders", {"email": 5}), (400, "GATEWAY_BAD_REQUEST"), "sender.email"),
        (
            ("PATCH", "/api/senders/1", {"sender_id": "2"}),
            (400, "GATEWAY_BAD_REQUEST"),
            "conflicting",
        ),
    ],
)
def test_an_error_of_the_gateway_has_the_form_of_a_services_error(
    gateway: GatewayStack, call: tuple[Any, ...], error: tuple[int, str], words: str
) -> None:
    answer = gateway.call(*call)
    assert (answer.status, answer.reason) == error
    assert words in answer.document["message"]
    assert answer.document["code"] == REASONS[answer.status][0].value[0]


def test_headers_and_bodies_are_limited(gateway: GatewayStack) -> None:
    headers = gateway.call("GET", "/api/senders", x_long="a" * 70_000)
    assert (headers.status, headers.reason) == (431, "GATEWAY_HEADERS_TOO_LARGE")
    body = gateway.call("POST", "/api/senders", {"email": "a" * 9 * 1024 * 1024}, key="ann")
    assert (body.status, body.reason) == (413, "GATEWAY_BODY_TOO_LARGE")
    message = gateway.call("POST", "/api/senders", {"email": "a" * 6 * 1024 * 1024}, key="ann")
    assert (message.status, message.document["code"]) == (429, 8)
    assert "larger than max" in message.document["message"]


def test_a_deadline_reaches_the_service(gateway: GatewayStack) -> None:
    answer = gateway.call("GET", "/api/senders/1", grpc_timeout="1n")
    # The service, its gRPC library and the gateway watch the deadline. On a busy machine, the
    # library answers before the service has the call, and gives no reason.
    assert answer.status == 504
    if answer.document["details"]:
        assert answer.reason in {"DEADLINE_EXCEEDED", "GATEWAY_TIMEOUT"}
    else:
        assert answer.document["message"] == "Deadline Exceeded"


def test_unknown_fields_of_a_json_body_are_ignored(gateway: GatewayStack) -> None:
    answer = gateway.call("POST", "/api/senders", {"email": "a@b.org", "nonsense": 1}, key="ann")
    assert (answer.status, "nonsense" in answer.document) == (200, False)


async def test_a_service_that_is_away_is_unavailable_and_the_others_answer(
    gateway: GatewayStack,
) -> None:
    stats = gateway.services["stats"]
    sender_id = gateway.sender()

    def answer() -> tuple[int, str]:
        found = gateway.call("GET", f"/api/stats?sender_id={sender_id}", key="ann")
        return found.status, "" if found.status == 200 else found.reason

    stats.child.signal(signal.SIGKILL)
    await eventually(lambda: not stats.child.running)
    try:
        assert answer() == (503, "GATEWAY_UNAVAILABLE")
        assert gateway.call("GET", f"/api/senders/{sender_id}", key="ann").status == 200
        assert gateway.call("GET", HEALTH, key=None).status == 200
    finally:
        await stats.start()
    await eventually(lambda: answer() == (200, ""))


def test_a_grpc_call_gets_a_grpc_error(gateway: GatewayStack) -> None:
    # Envoy refuses this call itself; its text must not become JSON.
    answer = gateway.call(
        "POST", "/outbox.v1.NoService/Nothing", b"", content_type="application/grpc", te="trailers"
    )
    assert answer.status == 200
    assert answer.headers["grpc-status"] == "12"
    assert "{" not in answer.headers.get("grpc-message", "")


def test_a_local_gateway_refuses_other_host_names_and_web_pages(gateway: GatewayStack) -> None:
    for headers in ({"host": "evil.example"}, {"origin": "https://evil.example"}):
        answer = gateway.call("GET", "/api/senders", key="ann", **headers)
        assert (answer.status, answer.reason) == (403, "GATEWAY_FORBIDDEN")
    assert gateway.call("GET", "/api/senders", key="ann", origin=gateway.url).status == 200


def test_the_access_log_has_no_url_and_no_body(gateway: GatewayStack) -> None:
    path = "/api/suppressions/secret%40example.com"
    answer = gateway.call("DELETE", f"{path}?user_id=ann")
    assert answer.reason == "SUPPRESSION_NOT_FOUND"
    gateway.call("PUT", path)
    request_id = answer.headers["x-request-id"]
    assert gateway.envoy is not None
    log = gateway.folder / "logs" / "gateway.log"
    # Envoy writes its log every 10 s and when it ends.
    gateway.runner.run(gateway.envoy.stop())
    gateway.runner.run(gateway.envoy.start())
    text = log.read_text()
    assert "secret" not in text
    (line,) = [line for line in text.splitlines() if request_id in line]
    assert json.loads(line)["method"] == "/outbox.v1.SuppressionService/DeleteSuppression"


def test_the_gateway_listens_on_its_port_alone(gateway: GatewayStack) -> None:
    assert gateway.envoy is not None
    assert listening_ports([gateway.envoy.child.pid]) == {int(gateway.url.rpartition(":")[2])}
